"""What `import agents` brings in, and what is said where an optional package is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

OPTIONAL = (
    "accelerate", "huggingface_hub", "lightning", "matplotlib", "onnx", "onnxruntime", "optuna", "sb3_contrib",
    "stable_baselines3", "tensorboard", "torchvision", "transformers",
)  # fmt: skip
"""What some users do not have, or what takes long to import."""

USES = {
    "import agents.integrations.lightning": ("lightning", "lightning"),
    "import agents.integrations.transformers": ("transformers", "transformers"),
    "import agents.integrations.optuna": ("optuna", "compare"),
    "from agents.hub import pull; pull('someone/policy')": ("huggingface_hub", "hub"),
    "from agents.onnx_export import export; export(agents.ControlPolicy.load(pretrained_path()), 'p.onnx')": (
        "onnx", "onnx",
    ),
}  # fmt: skip
"""A use -> the package that it needs, and the extra that installs it."""

WITHOUT = f"""
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import agents
from agents.tuner import pretrained_path

said = {{}}
for use in {list(USES)}:
    try:
        exec(use)
    except ImportError as error:
        said[use] = str(error)
print(json.dumps(said))
"""


def python(program: str, folder: Path) -> str:
    """What a program prints that is run from `folder`."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{program}"
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_agents_brings_in_no_optional_package(tmp_path: Path) -> None:
    program = "import agents; agents.Tuner.pretrained; print(*sorted(name.split('.')[0] for name in sys.modules))"
    assert set(python(program, tmp_path).split()).isdisjoint(OPTIONAL)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Use -> the message of its ImportError, where no optional package is installed."""
    found: dict[str, str] = json.loads(python(WITHOUT, tmp_path_factory.mktemp("user")))
    return found


@pytest.mark.parametrize("use", USES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(said: dict[str, str], use: str) -> None:
    package, extra = USES[use]
    assert said.get(use) == f"{package} is not installed; pip install 'hyperpilot[{extra}]'"

PYTHON := .venv/bin/python
DEVICE ?= cpu
# By a path, as type checkers find it, and not by an import hook.
EDITABLE := --config-settings editable_mode=compat

.PHONY: install demo test check docs benchmark faults

install: .venv/.installed

# torch goes first: its build (CPU or CUDA) is then settled before anything else asks for it. Nothing is compiled ahead:
# Python does that at a first import, and most of these packages' modules are never imported.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --no-compile -c constraints.txt torch
	$(PYTHON) -m pip install --no-compile -c constraints.txt $(EDITABLE) -e '.[compare,data,dev,docs,hub,lightning,onnx,transformers]'
	touch $@

demo: install
	$(PYTHON) scripts/demo.py

test: install
	$(PYTHON) -m pytest -n 2 --dist worksteal

check: install
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	MYPY_NUM_WORKERS=2 $(PYTHON) -m mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

benchmark: install
	$(PYTHON) scripts/benchmark.py --device $(DEVICE) --json benchmarks/$(DEVICE).json

faults: install
	$(PYTHON) -m pip install -q -c constraints.txt $(EDITABLE) -e '.[faults]'
	$(PYTHON) -m tests.faults

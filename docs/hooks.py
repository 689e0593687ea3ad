"""MkDocs hook: what the pages refer to outside of `docs/`.

On a code host, pages link to any file of the repository. So that the site has them, too, such files come along under
`source/`: Markdown as a page, code as a page that shows it, others as they are. Links to folders lead to the reference.
"""

from __future__ import annotations

import re
from os.path import dirname, join, normpath, relpath, splitext
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=(?:#[^)\s]*)?\))")
CODE = {".py": "python", ".toml": "toml", ".yml": "yaml", ".sh": "bash", ".txt": "text", "": "text"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what that links to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        path = waiting.pop()
        for target in (resolve(path, match[1]) for match in LINK.finditer((ROOT / path).read_text())):
            uri = site_path(target)
            if not (ROOT / target).is_file() or files.get_file_from_path(uri):
                continue
            if target.endswith(".md"):
                waiting.append(target)
            if uri == f"source/{target}":
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
            else:
                files.append(File.generated(config, uri, content=shown(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to where their targets lie on the site."""
    uri = page.file.src_uri
    path = uri.removeprefix("source/") if uri.startswith("source/") else f"docs/{uri}"
    if not (ROOT / path).is_file():
        return markdown  # code

    def led(link: re.Match[str]) -> str:
        target = resolve(path, link[1])
        return relpath(site_path(target), dirname(uri)) if (ROOT / target).exists() else link[1]

    return LINK.sub(led, markdown.replace("<!-- HPOEnv.__doc__ -->", environment()))


def resolve(path: str, link: str) -> str:
    """Where a link in the file at `path` leads, from the repository's root."""
    return normpath(join(dirname(path), link))


def site_path(target: str) -> str:
    """Where a file of the repository lies among the site's sources."""
    if (ROOT / target).is_dir():
        return "reference/index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"source/{target}.md" if splitext(target)[1] in CODE else f"source/{target}"


def shown(target: str) -> str:
    """A page that shows a file's text."""
    language, text = CODE[splitext(target)[1]], (ROOT / target).read_text()
    return f"---\nsearch: {{ exclude: true }}\n---\n# {target}\n\n`````{language}\n{text}`````\n"


def environment() -> str:
    """The docstring of `HPOEnv`: it is computed, so that reading the source does not give it."""
    from hpo_env.env import HPOEnv

    lines = (line.removeprefix("    ") for line in str(HPOEnv.__doc__).splitlines())
    return "\n".join(f"#{line}" if line.startswith("##") else line for line in lines)

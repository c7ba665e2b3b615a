"""A hook of MkDocs: links from docs/ to files outside of it.

On a code host such links work as they are. The site does not contain those files. A link to the README leads to the
front page; any other link leads to `repo_url` where mkdocs.yml sets one, and is plain text where it does not. A link to
a file that does not exist fails the build.
"""

import os
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?P<text>[^]]+)\]\((?P<path>\.\./[^)#]+)(?P<anchor>#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    docs = Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def replace(link: re.Match) -> str:
        target = Path(os.path.normpath(folder / link["path"]))
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_path}: broken link {link['path']}")
        path = target.relative_to(ROOT).as_posix()
        if path == "README.md":
            return f"[{link['text']}]({os.path.relpath(docs / 'index.md', folder)})"
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{path}{link['anchor'] or ''})"
        return link["text"]

    return LINK.sub(replace, markdown)

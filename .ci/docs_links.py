"""A hook of MkDocs: links from docs/ to files outside of it.

On a code host such links work as they are. The site does not contain those files. A link to the README leads to the
front page; any other link leads to `repo_url` where mkdocs.yml sets one, and is plain text where it does not. A link to
a file that does not exist fails the build.
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[(?P<text>[^]]+)\]\(\.\./(?P<path>[^)#]+)(?P<anchor>#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page, config, files) -> str:
    def replace(link: re.Match) -> str:
        if not (ROOT / link["path"]).exists():
            raise FileNotFoundError(f"{page.file.src_path}: broken link ../{link['path']}")
        if link["path"] == "README.md":
            return f"[{link['text']}](index.md)"
        if config.repo_url:
            return f"[{link['text']}]({config.repo_url.rstrip('/')}/blob/main/{link['path']}{link['anchor'] or ''})"
        return link["text"]

    return LINK.sub(replace, markdown)

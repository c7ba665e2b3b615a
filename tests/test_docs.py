"""The code blocks of the README and the docs: every one runs, or carries a comment with the reason why it does not.

`<!-- not run: REASON -->` before a block exempts it; `<!-- not run (COMMAND, ...): REASON -->` exempts its lines that
begin so. Of exempted lines the names are still checked: make targets, commands, options, modules. The Python blocks of
a page are one program. Hub models are small ones, in a cache as the hub's client lays it out.
"""

import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
import torch
import transformers
from test_project import list_make_targets

import fastvit
from fastvit import cli
from fastvit.data.leaves import CLASSES, draw_leaf

ROOT = Path(__file__).parents[1]
FOLDERS = (".", "docs", "docs/learn", "examples")
PAGES = [str(page.relative_to(ROOT)) for folder in FOLDERS for page in (ROOT / folder).glob("*.md")]
BLOCK = re.compile(
    r"^(?:<!-- not run(?: \((?P<exempt>[^)]+)\))?: (?P<reason>.+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# What a page does not do itself, with the names that its blocks leave behind.
CHECKS = {
    "docs/features.md": """
rows = [{"pixel_values": images[0], "labels": 1}, {"pixel_values": images[1], "labels": 0}]
assert model(**collate(rows)).logits.shape == (2, 3)
assert [list(tokens.shape) for tokens in backbone.last_hidden_state] == [[197, 192], [161, 192], [37, 192]]
""",
    "docs/serving.md": """
from fastapi.testclient import TestClient

with open("leaf.jpg", "rb") as file, TestClient(app) as client:
    assert client.post("/classify", files={"image": file}).json()["label"] == predict("leaf.jpg").label
    assert client.post("/classify", files={"image": b"no image"}).status_code == 422
""",
}


@dataclass
class Block:
    page: str
    line: int
    language: str
    code: str
    exempt: tuple[str, ...]  # beginnings of lines; ("",) is every line

    def is_exempt(self, command: str) -> bool:
        return command.startswith(self.exempt)


def read_blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = []
    for found in BLOCK.finditer(text):
        exempt = () if found["reason"] is None else tuple((found["exempt"] or "").split(", "))
        line = text.count("\n", 0, found.start("code"))
        blocks.append(Block(page, line, found["language"], found["code"], exempt))
    assert len(blocks) == text.count("\n```") / 2, f"{page}: a code block or its comment is not written as expected"
    return blocks


def list_commands(block: Block) -> list[str]:
    """The lines of a shell block without comments and assignments; a line that is continued is one."""
    lines = re.sub(r"\\\n\s*", "", block.code).splitlines()
    commands = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return [re.sub(r"^([A-Z_]+=\S* )+", "", command) for command in commands if command]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]
# (block, its commands) to run, and (block, command) that only have their names checked
RUN, EXEMPT = [], []
for block in BLOCKS:
    commands = list_commands(block) if block.language == "bash" else []
    if to_run := [command for command in commands if not block.is_exempt(command)]:
        RUN.append(pytest.param(to_run, id=f"{block.page}:{block.line}"))
    EXEMPT += [pytest.param(command, id=f"{block.page}:{command}") for command in commands if block.is_exempt(command)]
PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.language == "python" and not block.exempt})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the pages name, in which programs run."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}  # head dim 64, as timm's files imply
    vit = transformers.ViTConfig(image_size=32, intermediate_size=64, id2label=dict(enumerate(CLASSES)), **sizes)
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 32})
    model = fastvit.ViTForImageClassification(vit)
    for target in (folder / "runs" / "leaves", make_hub_folder(folder, "google/vit-base-patch16-224-in21k")):
        model.save_pretrained(target)
        processor.save_pretrained(target)
    dinov2 = transformers.Dinov2Model(transformers.Dinov2Config(image_size=28, mlp_ratio=2, **sizes))
    dinov2.save_pretrained(make_hub_folder(folder, "facebook/dinov2-base"))
    for name in ("vit_base_patch16_224.safetensors", "ViT-B_16.npz"):
        fastvit.convert(folder / "runs" / "leaves", folder / name)
    images = [f"my-images/{name}/{seed}.jpg" for name in CLASSES for seed in (0, 1)]
    for image in ("leaf.jpg", "a.jpg", "b.jpg", "c.jpg", "images/0.jpg", "images/1.jpg", *images):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        draw_leaf(CLASSES[0], seed=0, size=32).save(folder / image)
    for name in ("benchmarks/results", "before", "after"):
        shutil.copytree(ROOT / "benchmarks" / "results", folder / name)
    environment = {"HF_HUB_CACHE": str(folder / "hub"), "FASTVIT_CACHE_DIR": str(folder / "cache")}
    with forked.serve(environment, "fastvit.models.heads", "fastvit.serve.predictor", "transformers"):
        yield folder


def make_hub_folder(root: Path, name: str) -> Path:
    """The folder for a model in a cache of the hub."""
    folder = root / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("0" * 40)


@pytest.fixture
def run(workplace, tmp_path):
    def run(program: str, *arguments: str) -> str:
        log = tmp_path / "log"
        return forked.finish(forked.start(program, *arguments, log=log, cwd=workplace), log)

    return run


def test_every_block_runs_or_says_why_not():
    """Commands that no test can run as they are must be exempt, and an exemption must still apply to something."""
    assert {block.language for block in BLOCKS} <= {"python", "bash", "yaml", ""}  # "": diagrams
    for block in BLOCKS:
        if block.language == "python":
            compile(block.code, block.page, "exec")
            assert block.exempt in ((), ("",)), block
        lines = list_commands(block) if block.language == "bash" else [block.code]
        assert all(any(line.startswith(start) for line in lines) for start in block.exempt), block
    for commands in RUN:
        assert all(command.startswith(("fastvit ", "python -m ")) for command in commands.values[0]), commands
    assert len(PYTHON_PAGES) >= 4 and len(RUN) >= 3  # the pages and the pattern still fit each other


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run(page, run, tmp_path):
    lines: list[str] = []
    for block in read_blocks(page):
        if block.language == "python" and not block.exempt:
            lines += [""] * (block.line - len(lines)) + block.code.splitlines()  # a traceback has the page's lines
    (tmp_path / "page.py").write_text("\n".join(lines) + CHECKS.get(page, ""), encoding="utf-8")
    run(str(tmp_path / "page.py"))


@pytest.mark.parametrize("commands", RUN)
def test_commands_run(commands, run):
    for command in commands:
        words = shlex.split(command)
        assert (run("fastvit", *words[1:]) if words[0] == "fastvit" else run(*words[2:])).strip()


@pytest.mark.parametrize("command", EXEMPT)
def test_exempt_commands_have_right_names(command, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        assert words[1] in list_make_targets()
    if "-m" in words:
        assert importlib.util.find_spec(words[words.index("-m") + 1]), command
    if words[0] == "fastvit" or any(word.endswith(".finetune") for word in words):
        name = words[1] if words[0] == "fastvit" else "finetune"
        start = 2 if words[0] == "fastvit" else [word.endswith(".finetune") for word in words].index(True)
        capsys.readouterr()
        try:
            cli.main([name, "--help"])
        except SystemExit as end:
            assert not end.code
        known = capsys.readouterr().out
        for option in (word for word in words[start:] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", known), f"{command}: no option {option}"

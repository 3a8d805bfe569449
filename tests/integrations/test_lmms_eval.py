"""The lmms-eval plug-in: against a stand-in of its base class, and with `make test-lmms` in lmms-eval itself."""

import importlib
import json
import subprocess
import sys
import types
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from codebook import Schedule, Stage, Uniform, ask, load, miniature
from codebook.errors import CodebookError

INSTALLED = find_spec("lmms_eval") is not None
KEEP = 0.5


def questions():
    return [q for family in ("exist", "multi", "ocr") for q in miniature.tasks(family, "test", 0, 3)]


@pytest.fixture(scope="module")
def expected():
    """The library's own answers."""
    model, processor = load("miniature", "cpu")
    own, schedule = questions(), Schedule([Stage(0, KEEP, Uniform())])
    return [ask(model, processor, [q.images], [q.question], schedule)[0].text for q in own]


@pytest.fixture
def plugin(monkeypatch):
    """The plug-in, on top of what it uses of lmms-eval 0.7.3."""

    class Base:
        def __init__(self):
            self.task_dict = {}

    @dataclass
    class Manifest:
        model_id: str
        simple_class_path: str

    for name, content in {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Base}, "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    name = "codebook.integrations.lmms_eval"
    yield importlib.import_module(name)
    del sys.modules[name]


def request(doc_id, question, **generation):
    return SimpleNamespace(args=(question, generation, lambda doc: doc.images, doc_id, "scenes", "test"))


@pytest.mark.skipif(INSTALLED, reason="lmms-eval itself is there")
def test_answers_come_in_order_whatever_the_batches(plugin, expected):
    own = questions()
    model = plugin.PrunedModel(schedule="uniform", keep=KEEP, device="cpu", batch_size="2")
    model.task_dict = {"scenes": {"test": own}}
    said = model.generate_until([request(i, f"<image>\n{q.question}", max_new_tokens=32) for i, q in enumerate(own)])
    assert said == expected
    found = plugin.manifest()
    home, _, name = found.simple_class_path.rpartition(".")
    assert found.model_id == "codebook" and getattr(sys.modules[home], name) is plugin.PrunedModel
    i = next(i for i, text in enumerate(expected) if " " in text)
    cut = model.generate_until([request(i, own[i].question, max_new_tokens=32, until=[" "])])
    assert cut == [expected[i].split()[0]]


@pytest.mark.skipif(INSTALLED, reason="lmms-eval itself is there")
def test_what_is_wrong_is_said(plugin):
    with pytest.raises(CodebookError, match="no method 'magic'"):
        plugin.PrunedModel(schedule="magic")
    with pytest.raises(CodebookError, match="no dtype 'int3'"):
        plugin.PrunedModel(dtype="int3")
    for size in ("auto", 0, "-1", 1.5):
        with pytest.raises(CodebookError, match=r"batch_size is .*: give how many"):
            plugin.PrunedModel(batch_size=size)


TASK = """
task: scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.show
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 32}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(not INSTALLED, reason="run by `make test-lmms`")
def test_a_local_task_in_lmms_eval_itself(tmp_path, expected):
    """Offline, by the entry point, from the command line: the answers that the library gives."""
    rows = []
    for i, question in enumerate(questions()):
        paths = [tmp_path / f"{i}-{j}.png" for j in range(len(question.images))]
        for path, image in zip(paths, question.images, strict=True):
            image.save(path)
        rows.append({"question": question.question, "answer": question.answer, "images": [str(p) for p in paths]})
    (tmp_path / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "scenes.py").write_text(
        "from PIL import Image\n\n\ndef show(doc):\n    return [Image.open(path) for path in doc['images']]\n"
    )
    (tmp_path / "scenes.yaml").write_text(TASK.format(file=tmp_path / "scenes.jsonl"))
    arguments = f"pretrained=miniature,schedule=uniform,keep={KEEP}"
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "codebook", "--model_args", arguments, "--tasks", "scenes",
        "--include_path", tmp_path, "--batch_size", "2", "--device", "cpu", "--output_path", tmp_path / "out",
        "--log_samples",
    ]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    [log] = (tmp_path / "out").rglob("*samples_scenes.jsonl")
    logged = sorted((json.loads(line) for line in log.read_text().splitlines()), key=lambda one: one["doc_id"])
    assert [one["filtered_resps"] for one in logged] == expected

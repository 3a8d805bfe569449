"""The model is a stock LLaVA, and training computes what the stock model computes."""

import subprocess
import sys
import warnings

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from codebook import load
from codebook.errors import CodebookError
from codebook.evaluation import evaluate, mean
from codebook.miniature import TASK_FAMILIES, model, packing, prompt, tasks
from codebook.miniature.samples import of_miniature
from codebook.miniature.train import Recipe, Run, train
from codebook.models.loading import SHIPPED_MODELS
from codebook.store.locks import writing

WEIGHTS = SHIPPED_MODELS["miniature"]
SHIPPED = (WEIGHTS / "model.safetensors").exists()


@pytest.fixture(scope="module")
def fresh():
    built = model.model(seed=1).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if weight.dim() == 2 and not weight.any():  # residual branches start closed
                assert "embed" not in name
                weight.normal_(std=0.05, generator=generator)
    return built


@pytest.fixture(scope="module")
def processor():
    return model.processor()


def test_the_tokenizer_covers_every_word_and_agrees_with_the_packed_encoding(processor):
    for family in TASK_FAMILIES:
        for question in tasks(family, "train", 3, 20):
            for text in (question.question, question.answer):
                ids = processor.tokenizer(text)["input_ids"]
                assert model.UNK_ID not in ids
                assert ids == packing.tokenize(text)
    special = {"pad": model.PAD_ID, "bos": model.BOS_ID, "eos": model.EOS_ID, "unk": model.UNK_ID}
    assert {k: getattr(processor.tokenizer, f"{k}_token_id") for k in special} == special


def test_a_prompt_ends_with_text_and_batches_pad_on_the_left(processor):
    asked = [*tasks("exist", count=1), *tasks("rel", count=1)]
    texts = [prompt(processor, q.question) for q in asked]
    inputs = processor(images=[i for q in asked for i in q.images], text=texts, padding=True, return_tensors="pt")
    ids = inputs["input_ids"]
    assert (ids == model.IMAGE_ID).sum(1).tolist() == [144, 144]
    assert ids[:, -1].tolist() == [model.ASSISTANT_ID] * 2
    assert ids[0, 0] == model.PAD_ID and inputs["attention_mask"][0, 0] == 0
    assert ids[1, :3].tolist() == [model.BOS_ID, model.USER_ID, model.IMAGE_ID]


def test_several_images_are_counted_aloud(processor):
    text = prompt(processor, "what moved?", 3)
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids) == (
        "<s> <user> one <image> two <image> three <image> what moved ? <assistant>"
    )


def step_about(images):
    """The first step whose rows have so many images."""
    for step in range(200):
        packed = packing.batch(8, 0, step, 0)
        if len(packed.pixels) == images * len(packed.tokens):
            return packed
    raise AssertionError(images)


@pytest.mark.parametrize("images", [1, 2, 3, 5])
@pytest.mark.parametrize("drop", [False, True])
def test_the_packed_forward_equals_the_stock_model_on_each_question(fresh, processor, images, drop):
    packed = step_about(images)
    kept = torch.arange(0, 144, 2) if drop else torch.arange(144)
    packed.kept = kept.expand(len(packed.pixels), -1)
    with torch.no_grad():
        features, _ = packing.see(fresh, packed.pixels)
        visual = fresh.model.multi_modal_projector(features)
        logits = packing.answer_logits(fresh, visual, packed)
        stock_features = fresh.model.get_image_features(packed.pixels, return_dict=True).pooler_output
        torch.testing.assert_close(visual, torch.stack(tuple(stock_features)), atol=1e-5, rtol=1e-5)
        start = 0
        for row, own in enumerate(visual.unflatten(0, (-1, images))[:2]):
            # As the template writes it: <s> <user>, then each image, counted aloud if there are several.
            head = [model.BOS_ID, model.USER_ID]
            for place in packing.PLACES[:images]:
                head += [*[packing.IDS[place]] * (images > 1), *[model.IMAGE_ID] * 144]
            image = torch.tensor(head) == model.IMAGE_ID
            stays = ~image
            stays[image.nonzero()[:, 0].view(images, 144)[:, kept]] = True
            for segment in packed.segment[row][packed.segment[row] > 0].unique():
                place = packed.segment[row] == segment
                words = torch.cat([torch.tensor(head), packed.tokens[row, place]])
                embedded = fresh.get_input_embeddings()(words)
                embedded[: len(head)][image] = own.flatten(0, 1)
                left = torch.cat([stays, torch.ones(int(place.sum()), dtype=torch.bool)]).nonzero()[:, 0]
                stock = fresh.model.language_model(inputs_embeds=embedded[None, left], position_ids=left[None])
                stock = fresh.lm_head(stock.last_hidden_state)[0, -int(place.sum()) :]
                wanted = packed.target[row, place] >= 0
                end = start + int(wanted.sum())
                torch.testing.assert_close(logits[start:end], stock[wanted], atol=1e-4, rtol=1e-4)
                start = end
        assert start == int((packed.target[:2] >= 0).sum()) > 0


def test_training_reduces_the_loss_and_a_resumed_run_ends_in_the_same_state(tmp_path):
    recipe = Recipe(batch=(2, 2, 2), warm=1)

    def advance(run, *steps):
        run.stage = "words"
        losses = []
        for run.step in steps:
            losses.append(run.advance()["loss"][0])
        run.step += 1
        return losses

    whole = Run(tmp_path / "never", recipe)
    half = Run(tmp_path, recipe)
    straight = advance(whole, 0, 1, 2)
    stopped = advance(half, 0)
    half.save()
    half = Run(tmp_path, recipe)
    assert (half.stage, half.step) == ("words", 1)
    assert stopped + advance(half, 1, 2) == straight
    assert straight[2] < straight[0]
    for one, two in zip(whole.parameters, half.parameters, strict=True):
        assert torch.equal(one, two)


def test_a_run_of_another_seed_or_of_other_workers_and_an_unknown_option_are_refused(tmp_path):
    Run(tmp_path, Recipe()).save()
    for said, options in {
        "seed 0": {"seed": 1, "workers": 1},
        "workers 1": {"workers": 2},
        "learning": {"learning": 1},
    }.items():
        with pytest.raises(CodebookError, match=said):
            train(tmp_path, steps=2, device="cpu", **options)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]  # nothing of a refused run is left


def test_two_workers_train_and_leave_a_model_that_loads(tmp_path):
    folder = train(tmp_path, steps=2, workers=2, device="cpu", batch=(2, 2, 2))
    built, _ = model.load_weights(folder)
    assert built.dtype == torch.float32 and not built.training
    log = tmp_path / "log.jsonl"
    assert log.read_text().count("\n") == 3
    assert {file.stat().st_mode for file in folder.iterdir()} == {log.stat().st_mode}  # for others, as any new file


ENDLESS = """
import torch
from codebook.miniature.train import train

def told(*given, spawn=torch.multiprocessing.spawn, **options):
    context = spawn(*given, **options)
    print("begun", flush=True)
    return context

if __name__ == "__main__":
    torch.multiprocessing.spawn = told
    train("out", workers=2, device="cpu", batch=(2, 2, 2))
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """They would go on writing the checkpoint, beside the run that goes on with it."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    parent = subprocess.Popen([sys.executable, "endless.py"], cwd=tmp_path, stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"begun\n"
    parent.kill()
    parent.communicate(timeout=300)  # until nobody has the pipe any more


def test_a_second_run_at_once_is_refused(refused, tmp_path):
    with writing(tmp_path, patience=0):
        refused("miniature", "train", "--out", tmp_path, words=["another process is writing", "choose another folder"])
    assert not list(tmp_path.iterdir())


def test_a_missing_model_says_how_to_get_one(tmp_path):
    with pytest.raises(CodebookError, match="codebook miniature train"):
        model.load_weights(tmp_path)


@pytest.mark.skipif(not SHIPPED, reason="no weights")
class TestShipped:
    def test_it_loads_by_the_standard_calls_offline_without_torchvision_and_silently(self):
        code = (
            "import sys; sys.modules['torchvision'] = None\n"
            "from transformers import AutoProcessor, LlavaForConditionalGeneration, logging\n"
            "logging.disable_progress_bar()\n"
            f"LlavaForConditionalGeneration.from_pretrained({str(WEIGHTS)!r})\n"
            f"AutoProcessor.from_pretrained({str(WEIGHTS)!r})\n"
        )
        environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr.strip(), done.stderr

    def test_it_is_small_and_in_float32(self):
        assert (WEIGHTS / "model.safetensors").stat().st_size < 16e6
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            built, _ = load("miniature", "cpu")
        assert {p.dtype for p in built.parameters()} == {torch.float32}

    def test_its_name_stands_for_its_folder(self):
        named, _ = load("miniature", "cpu")
        stock = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32)
        assert named.config.to_dict() == stock.config.to_dict()
        weights, theirs = named.state_dict(), stock.state_dict()
        assert weights.keys() == theirs.keys() and all(torch.equal(weights[name], theirs[name]) for name in theirs)

    def test_it_answers_from_the_image(self):
        built, processor = load("miniature", "cpu")
        questions = of_miniature("test", 0, 20)
        assert mean(evaluate(built, processor, questions)) > 0.65
        assert mean(evaluate(built, processor, questions, blind=True)) < 0.35


def test_importing_the_package_does_not_import_torch():
    code = "import sys, codebook.miniature; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

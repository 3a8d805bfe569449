"""A close look at an answer: stages, who stands for whom, scores; against what the features say by themselves."""

import json

import pytest
from PIL import Image
from torch.nn.functional import normalize

from codebook import load, models
from codebook.inference.ask import ask
from codebook.inference.looking import look_closely
from codebook.inference.overlay import LATER, enlarged, marked, mass_picture, score_picture, stages_picture
from codebook.miniature.samples import of_miniature
from codebook.pruning import METHODS, Drop, FastV, Random, Schedule, Stage, Uniform

GRID = (2, 3)
GREY = Image.new("RGB", (90, 60), (100, 100, 100))


@pytest.fixture(scope="module")
def shown():
    model, processor = load("miniature")
    [picture] = of_miniature("test", 0, 1, ["ocr"])[0].pictures()
    return model, processor, picture


def test_who_stands_for_whom(shown):
    """Before the LLM the hidden states are the projector outputs: most like is the highest cosine among those."""
    model, processor, picture = shown
    found = look_closely(*shown, "read the number.", Schedule([Stage(0, 36, Uniform(), mass=True)]), 2)
    family = models.family(model)
    features = family.image_features(model, family.view(processor, picture))[0][0]
    unit, [kept] = normalize(features.float(), dim=-1), found.stages
    best = [kept[int((unit[token] @ unit[kept].T).argmax())] for token in range(144)]
    assert found.stands == {token: best[token] for token in range(144) if token not in kept}
    assert found.grid == (12, 12) and not found.scores and found.answer.kept == [kept]


def test_later_stages_pass_on_or_forget(shown):
    first = Stage(0, 36, Uniform(), mass=True)
    for mass in (True, False):
        found = look_closely(*shown, "read the number.", Schedule([first, Stage(3, 9, Random(), mass=mass)]), 2)
        assert set(found.stands.values()) <= set(found.stages[1])
        gone = set(range(144)) - set(found.stages[1])
        assert (set(found.stands) == gone) is mass and [len(left) for left in found.stages] == [36, 9]
        assert set(found.stands) <= gone
    dropped = look_closely(*shown, "read the number.", Schedule([first, Stage(3, 0, Drop())]), 2)
    assert dropped.stages[1] == [] and not dropped.stands


def test_scores_rank_what_is_kept(shown):
    found = look_closely(*shown, "read the number.", Schedule([Stage(4, 12, FastV())]), 2)
    ranked = sorted(found.scores, key=lambda token: -found.scores[token])
    assert len(found.scores) == 144 and sorted(ranked[:12]) == found.stages[0]


ALIKE = [
    "fastv(own_layer=True)@4:20",
    "fastv(own_layer=False)@4:20",
    "vidcom2:36",
    "seeded:36",
    "uniform:72+mass, dart@2:9",
]


@pytest.mark.parametrize("text", ALIKE)
def test_what_is_looked_at_is_what_runs(shown, text):
    model, processor, picture = shown
    schedule = Schedule.for_model(model, text)
    [plain] = ask(model, processor, [[picture]], ["read the number."], schedule, 4)
    found = look_closely(*shown, "read the number.", schedule, 4).answer
    assert (found.text, found.stages) == (plain.text, plain.stages)


def test_a_method_with_groups_of_its_own_says_who_stands_for_whom(shown):
    """Every dropped token stands in one group, and the groups' sizes are those that attention is given."""
    pruner = METHODS["divprune-merged"]()
    seen = []

    class Noted(type(pruner)):
        def groups(self, tokens, index):
            seen.append(groups := super().groups(tokens, index))
            return groups

    found = look_closely(*shown, "read the number.", Schedule([Stage(0, 20, Noted(*pruner.parts), mass=True)]), 2)
    [kept] = found.stages
    assert len(seen) == 2 and seen[0].tolist() == seen[1].tolist()  # the look's, and attention's
    assert found.stands == {token: kept[to] for token, to in enumerate(seen[0].tolist()) if kept[to] != token}


def centre(picture, token):
    row, col = divmod(token, GRID[1])
    return picture.getpixel((picture.width * (2 * col + 1) // 6, picture.height * (2 * row + 1) // 4))


def test_pictures():
    plain = enlarged(GREY, GRID)
    assert min(plain.size) == 600 and centre(plain, 4) == (100, 100, 100)
    stages = stages_picture(GREY, [[0, 1, 2], [0, 1], [0]], GRID)
    dark = centre(stages, 5)
    assert centre(stages, 0) == (100, 100, 100) and max(dark) < 40
    for token, colour in ((2, LATER[0]), (1, LATER[1])):  # half of its stage's colour, half of the dark picture
        assert centre(stages, token) == pytest.approx([(a + b) / 2 for a, b in zip(colour, dark, strict=True)], abs=1)
    assert stages_picture(GREY, [], GRID).tobytes() == stages_picture(GREY, [range(6)], GRID).tobytes()

    mass = mass_picture(GREY, {2: 0}, [0, 4], GRID)
    assert centre(mass, 0) == (100, 100, 100) and centre(mass, 5) == dark
    assert centre(mass, 1) not in (dark, (100, 100, 100))  # the line from 2 to 0

    heat = score_picture(GREY, {0: -1.0, 1: 0.0, 2: 3.0}, [2], GRID)
    brightness = [sum(centre(heat, token)) for token in range(3)]
    assert brightness == sorted(brightness) and centre(heat, 3) == (100, 100, 100)
    framed = marked(plain, 4, GRID)
    assert framed.getpixel((296, 450)) == framed.getpixel((603, 450)) == (255, 0, 160) != framed.getpixel((310, 450))


def test_commands(run, refused, tmp_path, shown):
    shown[2].save(tmp_path / "a.png")
    show = ["show", "miniature", "--image", tmp_path / "a.png", "--ask", "read the number.", "--keep", "0.2"]
    show += ["--out", tmp_path / "out.png"]
    code, out, _ = run(*show, "--methods", "seeded", "--draw", "mass", "--json")
    row = json.loads(out)["rows"][1]
    assert code == 0 and len(row["stands"]) == 144 - 28 and Image.open(tmp_path / "out.png").width > 1000
    refused(*show, "--methods", "uniform", "--draw", "scores", words=["uniform ranks no tokens"])
    refused(*show, "--methods", "uniform", "--draw", "mass", words=["write uniform+mass"])
    refused(*show, "--methods", "uniform", "--draw", "x", words=["use kept, mass, scores"])
    explain = ["explain", "miniature", "--image", tmp_path / "a.png", "--patch", "3,5", "--show", tmp_path / "p.png"]
    code, out, _ = run(*explain, "--json")
    assert code == 0 and "redundancy" not in json.loads(out) and Image.open(tmp_path / "p.png").width > 1000

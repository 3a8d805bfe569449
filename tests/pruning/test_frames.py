"""Methods that choose among all frames of a film: worked examples, and films in batches, in videos, behind stages."""

import math
import re

import pytest
import torch

from codebook.errors import CodebookError
from codebook.pruning import EVS, FastV, Random, Schedule, Stage, VidCom2
from codebook.pruning.methods.vidcom2 import divided
from tests import reference
from tests.models.cells import model
from tests.models.families import FAMILIES
from tests.prompts import assert_close, gone_from, mass, prompt, size
from tests.pruning.made import tokens
from tests.tiny import llava

FILMS = [[7, "image", "image", "image", 8, 9], [5, "image", "image", 6]]


def frames(*features, left=None):
    """Frames of one row of tokens; `left` has for each the tokens that an earlier stage left."""
    found = []
    for i, own in enumerate(features):
        whole = torch.tensor(own, dtype=torch.float32)
        one = tokens(1, len(own), whole, whole=whole)
        if left is not None:
            object.__setattr__(one, "ordinal", torch.tensor(left[i], dtype=torch.long))
        found.append(one)
    return found


def chosen(pruner, film, keep):
    return [index.tolist() for index in pruner.select_frames(film, keep)]


def test_evs_by_hand():
    # Cosine distances to the frame before: 0, 1 and 1 - 1 / sqrt 2 = 0.29; then 2, 0 and 0.29 again, of longer vectors
    first = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    second = [[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    third = [[-1.0, 0.0], [0.0, 3.0], [1.0, 0.2]]  # 1 - 1.2 / (sqrt 2 * sqrt 1.04) = 0.168
    film = frames(first, second, third)
    assert chosen(EVS(), film, 3) == [[0, 1, 2], [], []]
    assert chosen(EVS(), film, 4) == [[0, 1, 2], [], [0]]
    assert chosen(EVS(), film, 5) == [[0, 1, 2], [1], [0]]
    assert chosen(EVS(), film, 6) == [[0, 1, 2], [1, 2], [0]]
    assert chosen(EVS(), film, 7) == [[0, 1, 2], [1, 2], [0, 2]]
    # An earlier stage has left two tokens of each: places among these, compared with the whole frame before
    film = frames(first, second, third, left=[[0, 2], [0, 2], [0, 1]])
    assert chosen(EVS(), film, 4) == [[0, 1], [1], [0]]
    with pytest.raises(CodebookError, match=r"the first frame whole, 2 tokens, but 1 of 6 .* keep 0.334 or more"):
        EVS().select_frames(film, 1)


@torch.no_grad()
@pytest.mark.parametrize("images", [2, 3, 5, 7])
def test_evs_can_do_what_its_error_says(images):
    """The least share that it names is enough, where the images' shares are rounded and where a video's is."""
    target = llava()
    inputs = prompt(target, [["image"] * images + [8]])
    with Schedule([Stage(0, 0.03, EVS())])(target), pytest.raises(CodebookError) as error:
        target(**inputs)
    least = float(re.search(r"keep ([\d.]+) or more", str(error.value))[1])
    with Schedule([Stage(0, least, EVS())])(target) as pruning:
        target(**inputs)
    assert len(pruning.kept[0][0]) == size(target) and least <= 1 / images + 1 / size(target)


def test_vidcom2_of_features_that_are_no_numbers():
    with pytest.raises(CodebookError, match=r"not numbers .* bfloat16"):
        VidCom2().select_frames(frames([[math.nan, math.nan], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]), 2)


@torch.no_grad()
@pytest.mark.parametrize("pruner", [EVS(), VidCom2()], ids=repr)
def test_a_stage_that_keeps_nothing_drops_all(pruner):
    target = llava()
    inputs = prompt(target, FILMS)
    out = []
    for schedule in Schedule([Stage(0, 0.6, VidCom2()), Stage(2, 0, pruner)]), Schedule.parse("vidcom2:0.6, drop@2"):
        with schedule(target) as pruning:
            out.append(target(**inputs).logits[:, -1])
        assert all(not len(stages[1]) for stages in pruning.kept)
    assert torch.equal(*out)


def test_vidcom2_by_hand():
    # The second channel varies least and is all that counts: 1 1 in the first frame, 1 -1 in the second. Their means
    # are 1 and 0, the video's 0.5: least like both is the -1, then the other token of its frame. To the video they are
    # 3.6 3.6 and 3.6 1.0, so that a softmax at 0.01 is 0 and 1: the frames' scales are 0.5 and 1.5.
    film = frames([[9.0, 2.0], [-9.0, 2.0]], [[9.0, 2.0], [-9.0, -2.0]])
    assert chosen(VidCom2(), film, 1) == [[], [1]]  # 0.25 and 0.75
    assert chosen(VidCom2(), film, 2) == [[0], [1]]  # 0.5 and 1.5, the first one rounded up
    assert chosen(VidCom2(), film, 3) == [[0], [0, 1]]  # 0.75 and 2.25, of which there are 2
    film = frames([[9.0, 2.0], [-9.0, 2.0]], [[9.0, 2.0], [-9.0, -2.0]], left=[[0, 1], [0]])
    assert chosen(VidCom2(), film, 1) == [[], [0]]  # 2 * 0.5 to 1 * 1.5, of tokens that are left: 0.4 and 0.6


@pytest.mark.parametrize(
    "total,weights,most,expected",
    [
        (4, [1.0, 1.0], [3, 3], [2, 2]),
        (5, [1.0, 1.0], [3, 3], [3, 2]),  # 2.5 each
        (6, [1.0, 3.0, 2.0], [2, 2, 4], [1, 2, 3]),  # 1 3 2: the second has room for 2, and 4 are left for 1 : 2
        (7, [1.0, 9.0, 2.0], [2, 2, 4], [2, 2, 3]),  # 5 for 1 : 2 is 1.67 3.33
        (8, [1.0, 9.0, 2.0], [2, 2, 4], [2, 2, 4]),
        (1, [0.2, 0.5, 0.4], [4, 4, 4], [0, 1, 0]),
        (3, [1.0, 1.0, 1.0], [0, 2, 9], [0, 2, 1]),
    ],
)
def test_numbers_are_divided_up_to_what_there_is(total, weights, most, expected):
    assert divided(total, weights, most) == expected


def test_vidcom2_equals_its_formula_written_out():
    generator = torch.Generator().manual_seed(3)
    film = torch.randn(4, 6, 8, generator=generator) * torch.rand(8, generator=generator) + torch.rand(8)
    values = [[[float(x) for x in token] for token in frame] for frame in film]
    every = [token for frame in values for token in frame]
    mean = [sum(column) / len(every) for column in zip(*every, strict=True)]
    spread = [sum((x - m) ** 2 for x in column) for column, m in zip(zip(*every, strict=True), mean, strict=True)]
    steady = sorted(range(8), key=spread.__getitem__)[:4]

    def unit(token):
        own = [token[i] for i in steady]
        return [x / math.hypot(*own) for x in own]

    def centre(part):
        return [sum(column) / len(part) for column in zip(*part, strict=True)]

    def like(token, other):
        return sum(math.exp(-(math.dist(token, other) ** 2) / (2 * 2.0**k)) for k in range(-3, 2))

    values = [[unit(token) for token in frame] for frame in values]
    video = centre([token for frame in values for token in frame])
    to_video = [[like(token, video) for token in frame] for frame in values]
    score = [
        [a + like(t, centre(f)) for a, t in zip(row, f, strict=True)] for row, f in zip(to_video, values, strict=True)
    ]
    weight = [math.exp(-sum(row) / len(row) / 0.01) for row in to_video]
    share = [0.25 * (1 + own / sum(weight) - 0.25) for own in weight]
    found = chosen(VidCom2(), frames(*film.tolist()), 12)
    assert sum(map(len, found)) == 12
    assert all(abs(len(own) - 12 * part) < 1 for own, part in zip(found, share, strict=True))
    for own, row in zip(found, score, strict=True):
        assert own == sorted(sorted(range(6), key=row.__getitem__)[: len(own)])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pruner", [EVS(), VidCom2()], ids=repr)
def test_films_of_several_images(pruner, attention):
    """Each film has its own budget, alone or in a batch, and a later stage divides what is left; exact as ever."""
    target = llava(attention)
    schedule = Schedule([Stage(0, 0.6, pruner, mass=True), Stage(2, 4, FastV())])
    inputs = prompt(target, FILMS)
    with schedule(target) as pruning:
        out = target.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    n = size(target)
    first, second = ([len(stages[i]) for stages in pruning.kept] for i in (0, 1))
    each = int(0.6 * n)
    assert sum(first[:3]) == 3 * each and sum(first[3:]) == 2 * each and len(set(first)) > 1
    assert sum(second[:3]) == 12 and sum(second[3:]) == 8
    given = target, inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
    gone = gone_from(inputs, pruning, schedule)
    said = out.sequences[:, inputs["input_ids"].shape[1] :]
    ids, logits = reference.generate(*given, gone, said, mass=mass(inputs, pruning, schedule))
    assert torch.equal(said, ids)
    assert_close(torch.stack(out.logits, 1), logits)
    alone = prompt(target, FILMS[:1])
    alone["pixel_values"] = inputs["pixel_values"][:3]
    with schedule(target) as again:
        target.generate(**alone, max_new_tokens=1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again.kept, pruning.kept, strict=False))


@torch.no_grad()
def test_the_frames_of_a_video_are_one_film():
    target = model("llava_onevision", "sdpa")
    inputs = FAMILIES["llava_onevision"].inputs([["video", 5, 6]])
    with Schedule([Stage(0, 0.75, EVS())])(target) as pruning:
        target(**inputs)
    video, kept = pruning.images[0], pruning.kept[0][0].tolist()
    sizes = [grid.count for grid in video.layout.grids]
    assert len(sizes) > 1 and len(kept) == int(0.75 * video.count)
    assert [video.locate(i)[0] for i in kept].count(0) == sizes[0]  # the first frame, whole


@torch.no_grad()
def test_what_is_no_film_is_refused():
    target = model("llava_next", "sdpa")
    with Schedule([Stage(0, 0.5, VidCom2())])(target), pytest.raises(CodebookError, match="cut into crops"):
        target(**FAMILIES["llava_next"].inputs([["image", 5]]))
    with pytest.raises(CodebookError, match="leave quotas=shared out"):
        Schedule([Stage(0, 0.5, Random()), Stage(2, 0.25, EVS())], quotas="shared")
    with pytest.raises(CodebookError, match="leave quotas=shared out"):
        Schedule.parse("vidcom2:0.5; quotas=shared")

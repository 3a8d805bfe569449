"""Loaders of documents, charts, captions, clips and Parquet files, on small files made in the public formats."""

import io
import json
import math

import pytest
from PIL import Image

from codebook.cli.data import load_data
from codebook.errors import CodebookError
from codebook.evaluation.documents import CHOICE, DESCRIBE, SHORT
from codebook.evaluation.metrics import CHAIR, estimates
from codebook.inference.samples import samples_digest
from codebook.store.clips import ClipInfo, within
from tests.evaluation.loaded import one


def test_docvqa(put, tmp_path):
    put("spdocvqa_images/xnbl0037_1.png")
    record = {"questionId": 1, "question": "What date?", "image": "documents/xnbl0037_1.png", "docId": 2,
              "answers": ["1/8/93", "January 8, 1993"], "data_split": "val"}  # fmt: skip
    put("val_v1.0_withQT.json", {"dataset_name": "SP-DocVQA", "data": [record]})
    task, sample = one("docvqa", tmp_path)
    assert (task.name, sample.question) == ("docvqa", "What date?" + SHORT)
    assert [sample.score(text) for text in ("1/8/93", "1/8/94", "never")] == [1, pytest.approx(5 / 6), 0]


def test_infovqa(put, tmp_path):
    put("infographicsvqa_images/37313.jpeg")
    record = {"questionId": 9, "question": "Which?", "image_local_name": "37313.jpeg", "answers": ["pink"]}
    put("infographicsVQA_val_v1.0_withQT.json", {"data": [record]})
    assert one("infovqa", tmp_path)[1].score("Pink") == 1


def test_chartqa(put, tmp_path):
    put("test/png/41699051005347.png")
    record = {"imgname": "41699051005347.png", "query": "How many?", "label": "14"}
    put("test/test_human.json", [record])
    put("test/test_augmented.json", [record | {"label": "Yes"}])
    tasks = load_data([f"chartqa:{tmp_path}"])
    assert [task.name for task in tasks] == ["chartqa human", "chartqa augmented"]
    assert [task.samples[0].score(text) for task, text in zip(tasks, ("14.6", "yes"), strict=True)] == [1, 1]


def test_ocrbench(put, tmp_path):
    put("OCRBench_Images/IIIT5K/1.png")
    record = {"dataset_name": "IIIT5K", "image_path": "IIIT5K/1.png", "question": "what is written?", "id": 0,
              "type": "Regular Text Recognition", "answers": ["CENTRE"]}  # fmt: skip
    formula = record | {"dataset_name": "HME100k", "answers": "x ^ 2"}
    put("OCRBench.json", [record, formula])
    [task] = load_data([f"ocrbench:{tmp_path}"])
    word, math = task.samples
    assert word.question == "what is written?" and word.score("It says 'Centre'.") == 1 and word.score("cent") == 0
    assert math.score("= x^2") == 1 and math.score("X^2") == 0


COCO = {
    "images": [{"id": 5, "file_name": "5.jpg", "height": 8, "width": 8}, {"id": 6, "file_name": "6.jpg"}],
    "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "dining table"}],
    "annotations": [{"image_id": 5, "category_id": 2, "bbox": [0, 0, 1, 1]}],
}


def test_chair(put, tmp_path):
    """The table is among the instances, the woman in a caption; the other picture shows nothing that is known."""
    put("val2014/5.jpg")
    put("instances_val2014.json", COCO)
    captions = [{"image_id": 5, "caption": "A woman eats."}, {"image_id": 7, "caption": "A dog."}]
    put("captions_val2014.json", {"annotations": captions})
    put("synonyms.txt", "person, woman, man\ndining table, table\ndog, puppy\n")
    task, sample = one("chair", tmp_path)
    assert task.metric is CHAIR and (sample.question, sample.answers) == (DESCRIBE, ("dining table", "person"))
    # four mentions, one of them false, and both objects: precision 3/4, recall 1
    said = "Two women at a dining table with puppies; the men sit."
    assert sample.scorer.count(said, sample.answers) == (4, 1, 2, 2)
    assert sample.score(said) == pytest.approx(2 * 0.75 / 1.75)
    assert task.metric.values(task.sums([said]).mean(0)) == pytest.approx([2 * 0.75 / 1.75, 1, 1 / 4, 1])
    put("instances_val2014.json", COCO | {"annotations": [{"image_id": 8, "category_id": 2}]})
    with pytest.raises(CodebookError, match=r"instances_val2014\.json, annotation 1: .*unknown image"):
        load_data([f"chair:{tmp_path}"])
    put("instances_val2014.json", COCO | {"categories": [{"id": 2, "name": "dog"}, {"id": 2, "name": "person"}]})
    with pytest.raises(CodebookError, match=r"instances_val2014\.json: two categories have one id"):
        load_data([f"chair:{tmp_path}"])
    put("instances_val2014.json", COCO)
    put("synonyms.txt", "person, woman\n")
    with pytest.raises(CodebookError, match=r"synonyms\.txt has no line for 'dining table'"):
        load_data([f"chair:{tmp_path}"])
    put("synonyms.txt", "person, woman\ndog, woman\n")
    with pytest.raises(CodebookError, match=r"synonyms\.txt, line 2: 'woman' stands for 'dog' and for 'person'"):
        load_data([f"chair:{tmp_path}"])


def put_clip(path, frames=12, fps=4):
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width = stream.height = 32
        for i in range(frames):
            picture = Image.new("RGB", (32, 32), (20 * i, 20 * i, 20 * i))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def test_mvbench(put, tmp_path):
    record = {"video": "a.mp4", "question": "What?", "candidates": ["up", "down"], "answer": "down"}
    put("json/action_antonym.json", [record])
    put("json/action_sequence.json", [record | {"start": 1.0, "end": 1.5}])
    put_clip(tmp_path / "video/ssv2_video/a.mp4")
    put_clip(tmp_path / "video/star/Charades_v1_480/a.mp4")
    part, whole = (task.samples[0] for task in load_data([f"mvbench:{tmp_path}"]))
    assert (part.task, whole.task) == ("mvbench action_sequence", "mvbench action_antonym")
    assert whole.question.startswith("What?\nA. up\nB. down\nAnswer") and whole.score("B") == 1
    shades = [[round(frame.getpixel((9, 9))[0] / 20) for frame in own.pictures()] for own in (whole, part)]
    assert shades == [[0, 2, 3, 5, 6, 8, 9, 11], [4, 5, 6]]  # 8 of 12 frames; seconds 1 to 1.5 at 4 per second
    assert samples_digest([part]) != samples_digest([whole])
    put("json/action_antonym.json", [record | {"answer": "left"}])
    with pytest.raises(CodebookError, match=r"action_antonym\.json, record 1: the answer is none of the candidates"):
        load_data([f"mvbench:{tmp_path}"])
    put("json/action_antonym.json", [record])
    put("video/ssv2_video/a.mp4", "RIFF....AVI ")
    with pytest.raises(CodebookError, match=r"ssv2_video/a\.mp4 is no mp4 or webm file: convert it"):
        load_data([f"mvbench:{tmp_path}"])


def test_mvbench_frames_of_a_part(put, tmp_path):
    """The one task of folders of frames, three per second: seconds 1 to 3 are frames 3 to 9."""
    record = {"video": "clip", "question": "Who?", "candidates": ["a", "b"], "answer": "a", "start": 1, "end": 3}
    put("json/episodic_reasoning.json", [record])
    for i in range(30):
        put(f"video/tvqa/frames_fps3_hq/clip/{i:05}.jpg")
    _, sample = one("mvbench", tmp_path)
    assert [int(path.stem) for path in sample.images] == [3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ((3, 1), "record 1: it ends before it starts"),
        ((-5, 1), "0.start: .*greater than or equal to 0"),
        ((1, 1e308), "0.end: .*less than"),
        ((float("nan"), 1), "0.start: .*"),
    ],
)
def test_mvbench_parts_that_are_none(put, tmp_path, part, words):
    record = {"video": "clip", "question": "Who?", "candidates": ["a", "b"], "answer": "a"}
    put("json/episodic_reasoning.json", [record | {"start": part[0], "end": part[1]}])
    put("video/tvqa/frames_fps3_hq/clip/00001.jpg")
    with pytest.raises(CodebookError, match=rf"episodic_reasoning\.json.*{words}"):
        load_data([f"mvbench:{tmp_path}"])


@pytest.mark.parametrize("outside", ["../../secret.png", "/secret.png"])
def test_a_data_set_names_no_picture_outside_of_its_folder(put, tmp_path, outside):
    secret = put("secret.png")
    name = str(secret) if outside.startswith("/") else outside
    put("set/OCRBench_Images/1.png")
    record = {"dataset_name": "x", "image_path": name, "question": "q", "answers": ["a"]}
    put("set/OCRBench.json", [record])
    with pytest.raises(CodebookError, match=r"image of ocrbench lies outside of .*secret\.png; download"):
        load_data([f"ocrbench:{tmp_path / 'set'}"])


@pytest.mark.parametrize("content", ["", "hello", "%!PS-Adobe-3.0 EPSF-3.0"])
def test_a_file_that_is_no_picture_is_found_before_the_work(put, tmp_path, content):
    put("spdocvqa_images/1.png", content)
    put("val_v1.0.json", {"data": [{"question": "q", "answers": ["a"], "image": "1.png"}]})
    put("own.jsonl", {"image": "spdocvqa_images/1.png", "question": "q", "answer": "a"})
    for name in (f"docvqa:{tmp_path}", str(tmp_path / "own.jsonl")):
        with pytest.raises(CodebookError, match=r"is no picture: .*1\.png; use a whole PNG"):
            load_data([name])


def test_a_part_of_a_clip():
    every = within(lambda clip: range(clip.frames), 2.0, 3.0)
    assert every(ClipInfo(100, 10.0, 8, 8)) == list(range(20, 31))
    assert every(ClipInfo(5, 10.0, 8, 8)) == [4] and within(lambda clip: [0], 0.0, None)(ClipInfo(5, 1.0, 8, 8)) == [0]


def picture(shade):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def table(tmp_path):
    """Write a Parquet file of columns, pictures as the Hub has them."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(name, **columns):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(arrow.table(columns), path)
        return path

    return write


HUBS = [{"bytes": picture(shade), "path": f"{shade}.png"} for shade in (1, 2, 3)]


def test_parquet(table, tmp_path):
    file = table("a.parquet", image=HUBS, query=["q1", "q2", "q3"], label=["10", "20", "x"], kind=["h", "h", "a"])
    name = f"parquet:{file}?question=query&answer=label&task=kind&rule=relaxed"
    tasks = load_data([name])
    assert [(task.name, len(task.samples)) for task in tasks] == [("h", 2), ("a", 1)]
    two = tasks[0].samples[1]
    assert two.question == "q2" + SHORT and two.score("20.9") == 1 and two.score("22") == 0
    assert two.pictures()[0].getpixel((0, 0)) == (2, 0, 0)
    drawn = [load_data([name], count=1, seed=seed)[0].samples[0].question for seed in range(9)]
    assert set(drawn) == {"q1" + SHORT, "q2" + SHORT} and drawn == [
        load_data([name], count=1, seed=seed)[0].samples[0].question for seed in range(9)
    ]
    assert load_data([f"parquet:{tmp_path}?question=query&answer=label"])[0].name == tmp_path.stem


@pytest.mark.parametrize("answer", ["B", "1", "leaf", 1])
def test_parquet_with_options(table, answer):
    pictures = [[HUBS[0], HUBS[1]]]
    file = table("a.parquet", image=pictures, question=["which?"], answer=[answer], options=[["root", "leaf"]])
    [task] = load_data([f"parquet:{file}?options=options"])
    [sample] = task.samples
    assert sample.question.startswith("which?\nA. root\nB. leaf\n") and sample.answer == "B"
    assert [own.getpixel((0, 0))[0] for own in sample.pictures()] == [1, 2]


def test_parquet_with_an_answer_of_each_person(table):
    """Structs, as the Hub's VQAv2 has them."""
    people = [{"answer": text, "answer_confidence": "yes", "answer_id": 1} for text in ["net"] * 8 + ["mesh"] * 2]
    file = table("a.parquet", image=[HUBS[0]], question=["q"], answers=[people])
    sample = load_data([f"parquet:{file}?answer=answers&rule=vqa"])[0].samples[0]
    assert sample.answer == "net" and [sample.score(text) for text in ("Net", "mesh")] == [1, pytest.approx(0.6)]


def test_parquet_with_a_column_for_each_option(table):
    """As the Hub's MMBench has them, `nan` where there is none, and its hints."""
    options = {"A": ["root", "up"], "B": ["leaf", "down"], "C": ["bud", "nan"], "D": ["stem", None]}
    columns = {"image": HUBS[:2], "question": ["q", "r"], "answer": ["D", "B"], "hint": ["It grows.", "nan"]}
    name = "parquet:{}?options=A,B,C,D&hint=hint"
    first, second = load_data([name.format(table("a.parquet", **columns, **options))])[0].samples
    assert first.question.startswith("It grows.\nq\nA. root\nB. leaf\nC. bud\nD. stem\n") and first.answer == "D"
    assert second.question == "r\nA. up\nB. down" + CHOICE and second.score("B") == 1
    for wrong, words in (
        ({"A": ["root", None]}, "a.parquet, record 2: an option is missing before the last one; name the columns in"),
        ({"answer": ["D", "C"]}, "a.parquet, record 2: 'C' is none of its options"),
        ({"B": [1, 2]}, "a.parquet, record 1: column 'B' holds 1, where a text or nothing is read"),
    ):
        file = table("a.parquet", **columns | options | wrong)
        with pytest.raises(CodebookError, match=words):
            load_data([name.format(file)])


@pytest.mark.parametrize(
    ("answers", "last", "right"),
    [
        (["2", "0"], ["leaf", "root"], "CA"),  # numbers from 0, as AI2D has them, though the first is a text, too
        (["2", "0"], ["7", "0"], "BB"),  # texts: no row speaks against it
        (["B", "A"], ["B", "A"], "BA"),  # letters, though the second is a text, too
    ],
)
def test_answers_of_a_column_have_one_meaning(table, answers, last, right):
    file = table("a.parquet", image=HUBS[:2], question=["q", "r"], answer=answers, options=[["3", "2", "4"], last])
    assert "".join(s.answer for s in load_data([f"parquet:{file}?options=options"])[0].samples) == right


def test_parquet_whose_questions_have_their_options(table):
    """As MMStar has them on the Hub; and RealWorldQA, whose questions say what to answer with."""
    texts = ["Which?\nOptions: A: root, B: leaf", "Why?\nOptions: A: so, B: not"]
    file = table("a.parquet", image=HUBS[:2], question=texts, answer=["B", "A"])
    first, second = load_data([f"parquet:{file}?rule=letter"])[0].samples
    assert (first.question, second.answer) == (texts[0] + CHOICE, "A")
    said = ["B", "(B) leaf", "Option B", "The answer is B.", "A", "Because", "leaf"]
    assert [first.score(text) for text in said] == [1, 1, 1, 1, 0, 0, 0]
    with pytest.raises(CodebookError, match="record 1: 'B' is none of its options"):
        load_data([f"parquet:{table('b.parquet', image=HUBS[:1], question=['q'], answer=['B'], options=[['x']])}"
                   "?options=options"])  # fmt: skip
    with pytest.raises(CodebookError, match=r"record 2: 'leaf' is no option's letter; give another rule"):
        load_data([f"parquet:{table('c.parquet', image=HUBS[:2], question=texts, answer=['B', 'leaf'])}?rule=letter"])
    texts = ["Which? A. left B. right\nPlease answer directly with only the letter.", "How many? Answer with a number."]
    file = table("d.parquet", image=HUBS[:2], question=texts, answer=["A", "Two"])
    samples = load_data([f"parquet:{file}?rule=exact"])[0].samples
    assert [sample.question for sample in samples] == texts
    assert [samples[0].score(text) for text in ("a", " A. ", "A. left")] == [1, 1, 0]
    assert [samples[1].score(text) for text in ("two", "2")] == [1, 0]


def test_parquet_asked_in_every_rotation(table):
    columns = {"image": HUBS[:2], "question": ["q", "r"], "answer": ["C", "A"]}
    options = {"A": ["root", "up"], "B": ["leaf", "down"], "C": ["bud", "nan"]}
    name = f"parquet:{table('a.parquet', **columns, **options)}?options=A,B,C&circular=yes"
    [task] = load_data([name])
    assert [s.question.removesuffix(CHOICE) for s in task.samples] == [
        "q\nA. root\nB. leaf\nC. bud", "q\nA. leaf\nB. bud\nC. root", "q\nA. bud\nB. root\nC. leaf",
        "r\nA. up\nB. down", "r\nA. down\nB. up",
    ]  # fmt: skip
    assert "".join(s.answer for s in task.samples) == "CBAAB"
    for said, (circular, accuracy) in (("CBAAB", (1, 1)), ("CBAAA", (0.5, 0.8)), ("AAAAA", (0, 0.4))):
        found = estimates(task.metric, task.sums(list(said)))
        assert [one.value for one in found] == pytest.approx([circular, accuracy])
    assert {len(load_data([name], 1, seed)[0].samples) for seed in range(9)} == {2, 3}  # all rotations of one question
    with pytest.raises(CodebookError, match="circular=yes asks with options in every order"):
        load_data([name.replace("options=A,B,C&", "")])


def test_captions_by_cider(table):
    """Worked by hand for two pictures: `a` is in the captions of both and weighs 0, all else ln 2."""
    file = table("a.parquet", image=HUBS[:2], question=["Describe it."] * 2, answer=[["a cat"], ["a dog", "the dog"]])
    first, second = load_data([f"parquet:{file}?rule=cider"])[0].samples
    assert first.question == "Describe it."
    for said, score in (
        ("A cat.", 1 / 2),  # words and pairs are the same; there are no three, and no four
        ("cat", math.exp(-1 / 72) / 4),  # one pair less
        ("cat cat", 1 / 8),  # twice the weight, which is cut, and as long: a cosine of 1/2
        ("a dog", 0),
        ("", 0),
    ):
        assert first.score(said) == pytest.approx(score), said
    # Of the first reference the word and no pair; of the second the pair, and of its two words, of like weight, both.
    assert second.score("the dog") == pytest.approx(((1 / 2**0.5) / 4 + 2 / 4) / 2)
    alone = load_data([f"parquet:{file}?rule=cider"], 1)[0].samples[0]
    assert alone.score("a cat") == 0  # of a single picture no word weighs anything


def test_hallusionbench_as_the_hub_has_it(table):
    """Two sets; in the first, two figures about which two questions are asked, by hand."""
    places = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1), (1, 1, 0)]  # set, figure, question
    columns = {
        "image": [HUBS[0], HUBS[0], HUBS[1], HUBS[1], {"bytes": picture(9), "path": "c.png"}],
        "question": list("abcde"), "gt_answer": list("10011"), "category": ["VS"] * 5,
    }  # fmt: skip
    columns |= {name: [str(one[i]) for one in places] for i, name in enumerate(("set_id", "figure_id", "question_id"))}
    query = "answer=gt_answer&rule=yesno&figure=category,set_id,figure_id&pair=category,set_id,question_id"
    file = table("a.parquet", **columns)
    [task] = load_data([f"parquet:{file}?{query}"])
    assert [s.answer for s in task.samples] == ["yes", "no", "no", "yes", "yes"] and task.groups == [[0, 1, 2, 3], [4]]
    names = ("accuracy", "per_figure", "per_question")
    for said, shares in (
        ("yes no no yes yes", (1, 1, 1)),
        ("yes no yes yes yes", (4 / 5, 2 / 3, 2 / 3)),  # figure 2 and question 0 of set 0 are not whole
        ("no no yes yes no", (2 / 5, 0, 1 / 3)),
    ):
        found = estimates(task.metric, task.sums(said.split()))
        assert dict(zip(task.metric.names, [one.value for one in found], strict=True)) == pytest.approx(
            dict(zip(names, shares, strict=True))
        )
    assert {len(load_data([f"parquet:{file}?{query}"], 4, seed)[0].samples) for seed in range(9)} <= {
        1,
        4,
    }  # whole sets
    with pytest.raises(CodebookError, match="figure and pair belong together"):
        load_data([f"parquet:{file}?{query.partition('&pair')[0]}"])


def test_pictures_within_a_text_are_refused(table):
    """As MMMU has them: to show them before it, or only the first, would be another question."""
    given = {"image": HUBS[:1], "question": ["Is <image 1> like <image 2>?"], "answer": ["A"]}
    for columns, query in (
        (given, "?rule=letter"),
        (given | {"question": ["Which?"], "options": [["<image 1>", "<image 2>"]]}, "?options=options"),
    ):
        with pytest.raises(
            CodebookError, match="record 1: '<image 1>' stands in its texts, and pictures within a text"
        ):
            load_data([f"parquet:{table('a.parquet', **columns)}{query}"])


def test_answers_of_two_meanings_are_refused(table):
    file = table("a.parquet", image=HUBS[:2], question=["q", "r"], answer=["leaf", "A"], options=[["leaf", "bud"]] * 2)
    with pytest.raises(CodebookError, match=r"record 2: 'A' is none of its options, read as the answers before; name"):
        load_data([f"parquet:{file}?options=options"])


def test_parquet_with_several_answers(table):
    file = table("a.parquet", image=[HUBS[0]], question=["q"], answers=[["net", "mesh", "net"]])
    sample = load_data([f"parquet:{file}?answer=answers&rule=anls"])[0].samples[0]
    assert sample.answer == "net" and sample.score("mesh") == 1
    blank = table("a.parquet", image=[HUBS[0]], question=["q"], answers=[["", "", "net"]])
    for rule in ("same", "anls", "relaxed"):
        sample = load_data([f"parquet:{blank}?answer=answers&rule={rule}"])[0].samples[0]
        assert (sample.answer, sample.score("net"), sample.score("")) == ("net", 1, 0)


@pytest.mark.parametrize(
    ("change", "query", "words"),
    [
        ({}, "?colour=x", "no key behind '\\?' is called 'colour': use image, question"),
        ({}, "?rule=bleu", "no rule 'bleu': use same, vqa"),
        ({}, "?answer=label", "a.parquet has no column 'label', but 'image, question, answer'"),
        ({"question": ["q", None]}, "", "a.parquet, record 2: column .question. holds None, where a text is read"),
        ({"answer": [["x"], []]}, "", "a.parquet, record 2: it has no answer"),
        (
            {"image": [HUBS[0], {"bytes": b"no picture", "path": "x"}]},
            "",
            "a.parquet, record 2: column 'image' holds no",
        ),
        ({"image": [HUBS[0], {"bytes": None, "path": "x"}]}, "", "a.parquet, record 2: column 'image' holds no"),
        ({"image": ["a.png", "b.png"]}, "", "a.parquet, record 1: .*'a.png', where a picture's bytes or a list"),
        ({"image": [[HUBS[0]], []]}, "", "a.parquet, record 2: column 'image' holds no"),
        ({"answer": [3.5, 4.5]}, "", "a.parquet, record 1: column 'answer' holds 3.5, where a text, a whole number"),
        ({"answer": ["x", " "]}, "", "question 'r.*has no answer to score against"),  # as test splits have it
        ({"answer": ["Yes", "maybe"]}, "?rule=yesno", "a.parquet, record 2: 'maybe' is neither yes nor no"),
        ({"answer": [["x"] * 4, ["x"] * 3]}, "?rule=vqa", "record 2: .* no answer of 3 can score 1; give rule=same"),
        ({}, "?split=validation", "split and config choose files of hub:, and all of .*a.parquet are read: name those"),
        ({"kind": ["a", "b\tc"]}, "?task=kind", "a.parquet, record 2: the task 'b.*tc' has characters that cannot"),
        ({}, "?rule=vqa&rule=anls", "a key stands twice behind '\\?'"),
        ({}, "?question=answer", "one column is to be two things"),
        ({"options": [["a"], ["b"]]}, "?options=options", "a.parquet, record 1: 'x' is none of its options"),
    ],
)
def test_parquet_that_is_wrong(table, change, query, words):
    file = table("a.parquet", **({"image": HUBS[:2], "question": ["q", "r"], "answer": ["x", "y"]} | change))
    with pytest.raises(CodebookError, match=words) as error:
        load_data([f"parquet:{file}{query}"])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_picture_that_breaks_off_in_parquet(table):
    file = table("a.parquet", image=[picture(1)[:45]], question=["how many?"], answer=["x"])
    with pytest.raises(CodebookError, match=r"cannot read image of the question 'how many\?.*: .*; use a whole"):
        load_data([f"parquet:{file}"])


def test_parquet_of_yes_and_no(table):
    """Capital letters, as the Hub's MME has them."""
    file = table("a.parquet", image=HUBS[:2], question=["q", "r"], answer=["Yes", "No"])
    yes, no = load_data([f"parquet:{file}?rule=yesno"])[0].samples
    assert [yes.score("Yes, it is."), yes.score("no"), no.score("No.")] == [1, 0, 1]


def test_damaged_parquet(table, tmp_path):
    whole = table("a.parquet", image=HUBS, question=["q"] * 3, answer=["x"] * 3).read_bytes()
    for data in (
        b"",
        b"PAR1",
        whole[:-20],
        whole[:100] + bytes(60) + whole[160:],
        whole[:-60] + bytes(40) + whole[-20:],
    ):
        (tmp_path / "a.parquet").write_bytes(data)
        with pytest.raises(CodebookError, match=r"a\.parquet") as error:
            load_data([f"parquet:{tmp_path / 'a.parquet'}"])
        assert "\n" not in str(error.value)
    with pytest.raises(CodebookError, match="no file or folder"):
        load_data([f"parquet:{tmp_path / 'none'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CodebookError, match=r"holds no \.parquet files"):
        load_data([f"parquet:{tmp_path / 'empty'}"])
    with pytest.raises(CodebookError, match="--data parquet:FILE_OR_FOLDER"):
        load_data(["parquet"])


def test_videomme(table, tmp_path):
    columns = {"videoID": ["v"], "question": ["Who?"], "options": [["A. he", "B. she"]], "answer": ["B"]}
    table("videomme/test-00000-of-00001.parquet", **columns, duration=["short"])
    put_clip(tmp_path / "data/v.mp4")
    task, sample = one("videomme", tmp_path)
    assert task.name == "videomme short" and sample.question.startswith("Who?\nA. he\nB. she\nAnswer")
    assert sample.score("B. she") == 1 and len(sample.pictures()) == 8
    table("videomme/test-00000-of-00001.parquet", **columns | {"answer": ["C"]}, duration=["short"])
    with pytest.raises(CodebookError, match=r"record 1: the answer is no option's letter"):
        load_data([f"videomme:{tmp_path}"])
    table("videomme/test-00000-of-00001.parquet", **columns, duration=["short"])
    (tmp_path / "data/v.mp4").unlink()
    with pytest.raises(CodebookError, match=r"image of videomme is missing: .*v\.mp4"):
        load_data([f"videomme:{tmp_path}"])


def test_a_data_set_of_the_hub(table, tmp_path, monkeypatch):
    """The files of the split, of one config, at a revision; what else is there is not fetched."""
    import huggingface_hub
    from huggingface_hub import hf_api

    parts = [f"plain/part-0000{i}-of-00003" for i in (0, 2)]
    for name in ("plain/test-00000-of-00001", "plain/train-00000-of-00001", "other/test", "plain/testing-0", *parts):
        table(f"{name}.parquet", image=HUBS[:1], question=[name], answer=["x"])
    asked = []

    def info(self, name, revision=None, files_metadata=False):
        files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.parquet")]
        return type("Info", (), {"siblings": [hf_api.RepoSibling(rfilename=file, size=9) for file in files]})

    def download(name, **options):
        asked.append((name, options["repo_type"], options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    [task] = load_data(["hub:owner/set@abc?config=plain"])
    assert task.samples[0].question.startswith("plain/test-0")
    assert asked == [("owner/set", "dataset", "abc", ["plain/test-00000-of-00001.parquet"])] and task.name == "set@abc"
    for name in ("plain/val/0000", "plain/val/0001", "plain/train/0000", "more/val/0000", "plain/partial-all/0000"):
        table(f"{name}.parquet", image=HUBS[:1], question=[name], answer=["x"])
    [task] = load_data(["hub:owner/set@refs/convert/parquet?config=plain&split=val"])
    assert asked[-1][2] == "refs/convert/parquet"
    assert sorted(asked[-1][3]) == ["plain/val/0000.parquet", "plain/val/0001.parquet"]
    assert task.name == "set@refs/convert/parquet" and len(task.samples) == 2
    for name, words in {
        "hub:owner/set?split=dev": "owner/set has no such files",
        "hub:owner/set?split=val": "several configs have this split, more, plain: name one",
        "hub:owner/set?split=all": "'plain/partial-all/0000.parquet' has the beginning of the split alone: name",
        "hub:owner/set": "several configs have this split, other, plain: name one behind '\\?', as in config=NAME",
        "hub:owner/set?split=part": "of the 3 files of this split 2 are here: connect, and fetch all",
        "hub:owner/set@": "'' is no revision: name a branch",
        "hub:set": "write OWNER/NAME",
        "hub": "--data hub:OWNER/NAME",
    }.items():
        with pytest.raises(CodebookError, match=words):
            load_data([name])
    monkeypatch.setattr("codebook.store.hub.LARGEST_DATA_SET", 8)
    with pytest.raises(CodebookError, match="at most 8 are fetched"):
        load_data(["hub:owner/set?config=plain"])


@pytest.mark.parametrize("odd", [None, 3, [], {}, [[1]], {"a": 1}, "", float("nan")])
def test_another_type_inside_is_one_error(put, tmp_path, odd):
    """Each field of each new loader's records, and the records themselves, in turn: the file is named."""
    put("images/1.png")
    put("OCRBench_Images/1.png")
    put("test/png/1.png")
    put("test/test_augmented.json", [])
    document = {"question": "q", "answers": ["a"], "image": "1.png", "image_local_name": "1.png"}
    chart = {"imgname": "1.png", "query": "q", "label": "a"}
    text = {"dataset_name": "x", "image_path": "1.png", "question": "q", "answers": ["a"]}
    cases = {
        ("docvqa", "val_v1.0.json"): (document, lambda own: {"data": own}),
        ("infovqa", "infographicsVQA_val_v1.0.json"): (document, lambda own: {"data": own}),
        ("chartqa", "test/test_human.json"): (chart, lambda own: own),
        ("ocrbench", "OCRBench.json"): (text, lambda own: own),
    }
    for (kind, file), (record, wrap) in cases.items():
        for content in (odd, wrap(odd), wrap([odd]), *(wrap([record | {key: odd}]) for key in record)):
            put(file, json.dumps(content))
            try:
                tasks = load_data([f"{kind}:{tmp_path}"])
            except CodebookError as error:
                assert "\n" not in str(error) and len(str(error)) < 600 and str(tmp_path) in str(error)
            else:
                texts = [(s.question, s.answer) for task in tasks for s in task.samples]
                assert all(isinstance(text, str) for pair in texts for text in pair)

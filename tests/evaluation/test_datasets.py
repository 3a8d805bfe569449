"""Loaders on small files made in the formats of the public ones."""

import json

import pytest
from PIL import Image

from codebook.cli.data import load_data
from codebook.errors import CodebookError
from codebook.evaluation.datasets import COGNITION, PERCEPTION
from codebook.evaluation.documents import SHORT
from tests.evaluation.loaded import one

TEN = ["net"] * 6 + ["mesh"] * 4


def test_vqav2(put, tmp_path):
    put("val2014/COCO_val2014_000000262148.jpg")
    question = {"image_id": 262148, "question": "Where is he looking?", "question_id": 262148000}
    put("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [question]})
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(TEN)]
    record = {"image_id": 262148, "question_id": 262148000, "answers": answers, "multiple_choice_answer": "net"}
    put("v2_mscoco_val2014_annotations.json", {"annotations": [record]})
    task, sample = one("vqav2", tmp_path)
    assert (task.name, sample.question, sample.answer) == ("vqav2", "Where is he looking?" + SHORT, "net")
    assert [sample.score(text) for text in ("Net.", "the mesh", "wall")] == [1, 1, 0]
    assert sample.images[0].name == "COCO_val2014_000000262148.jpg"


def test_gqa(put, tmp_path):
    put("images/n161313.jpg")
    put("testdev_balanced_questions.json", {"201307251": {"imageId": "n161313", "question": "Is it?", "answer": "no"}})
    _, sample = one("gqa", tmp_path)
    assert sample.question == "Is it?" + SHORT and sample.score("No") == 1 and sample.score("yes") == 0


def test_textvqa(put, tmp_path):
    put("train_images/003a8ae2ef43b901.jpg")
    record = {"question": "what brand?", "image_id": "003a8ae2ef43b901", "question_id": 1, "answers": ["dakota"] * 10}
    put("TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [record]})
    _, sample = one("textvqa", tmp_path)
    assert sample.score("Dakota") == 1 and sample.score("nikon") == 0
    put("TextVQA_0.5.1_val.json", {"data": [record | {"answers": ["dakota"] * 2}]})
    with pytest.raises(CodebookError, match=r"are not those of textvqa: .*no answer of 2 can score 1"):
        load_data([f"textvqa:{tmp_path}"])


def test_vizwiz(put, tmp_path):
    put("val/VizWiz_val_00000000.jpg")
    answers = [{"answer": a, "answer_confidence": "yes"} for a in ["unanswerable"] * 8 + ["can"] * 2]
    put("val.json", [{"image": "VizWiz_val_00000000.jpg", "question": "What?", "answers": answers, "answerable": 0}])
    _, sample = one("vizwiz", tmp_path)
    assert "Unanswerable" in sample.question and sample.score("Unanswerable") == 1
    assert sample.score("can") == pytest.approx(0.6)


def test_pope(put, tmp_path):
    put("val2014/COCO_val2014_000000310196.jpg")
    for split, label in (("random", "yes"), ("popular", "no"), ("adversarial", "no")):
        record = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a car?", "label": label}
        put(f"coco_pope_{split}.json", json.dumps(record) + "\n")
    tasks = load_data([f"pope:{tmp_path}"])
    assert [task.name for task in tasks] == ["pope random", "pope popular", "pope adversarial"]
    assert [task.samples[0].score("No, there is not.") for task in tasks] == [0, 1, 1]
    assert tasks[0].metric.names[0] == "f1"


def test_mme(put, tmp_path):
    """Both layouts of the release: pictures beside the questions, or in folders of their own."""
    text = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    for category in (*PERCEPTION, *COGNITION):
        folded = category in ("posters", "scene")
        put(f"{category}/{'images/' if folded else ''}0001.jpg")
        put(f"{category}/{'questions_answers_YN/' if folded else ''}0001.txt", text)
    tasks = load_data([f"mme:{tmp_path}"])
    assert [task.name for task in tasks] == [f"mme {category}" for category in (*PERCEPTION, *COGNITION)]
    for task in tasks:
        assert [s.answer for s in task.samples] == ["yes", "no"] and task.groups == [[0, 1]]
        assert task.samples[0].question == "Is there a dog? Please answer yes or no." + SHORT
    assert len(load_data([f"mme:{tmp_path}"], count=1)[0].samples) == 2  # both questions of an image, or none


def test_refcoco(put, tmp_path):
    put("train2014/COCO_train2014_000000580957.jpg")
    image = {"id": 0, "file_name": "COCO_train2014_000000580957.jpg", "height": 480, "width": 640, "caption": "bowl"}
    box = {"image_id": 0, "bbox": [64, 48, 128, 96]}
    put("finetune_refcoco_val.json", {"images": [image], "annotations": [box]})
    task, sample = one("refcoco", tmp_path)
    assert task.name == "refcoco val" and sample.question.endswith(": bowl")
    assert sample.answer == "[0.100, 0.100, 0.300, 0.300]" and sample.score(sample.answer) == 1


def test_ai2d(put, tmp_path):
    put("images/0.png")
    put("ai2d_test_ids.csv", "0\n")
    asked = {"What is C?": {"answerTexts": ["leaf", "root", "stem", "bud"], "correctAnswer": 1, "abcLabel": False}}
    put("questions/0.png.json", {"imageName": "0.png", "questions": asked})
    _, sample = one("ai2d", tmp_path)
    assert "\nA. leaf\nB. root\n" in sample.question and sample.score("B") == 1 and sample.score("C") == 0


def test_a_file_of_samples_with_several_answers_and_a_film(put, tmp_path):
    for i in range(20):
        put(f"film/{i:02}.png")
    put("a.png")
    lines = [
        {"image": "a.png", "question": "q", "answers": ["red", "crimson", "red"], "task": "t"},
        {"video": "film", "question": "q", "answer": "left", "task": "v"},
    ]
    tasks = load_data([str(put("data.jsonl", "\n".join(map(json.dumps, lines))))])
    assert [task.name for task in tasks] == ["t", "v"]
    [first], [second] = (task.samples for task in tasks)
    assert first.answer == "red" and [first.score(text) for text in ("Crimson", "blue")] == [1, 0]
    assert [path.stem for path in second.images] == ["01", "03", "06", "08", "11", "13", "16", "18"]


def test_questions_about_one_film_are_about_one(put, tmp_path):
    """Frames in memory are the same pictures: groups of intervals and of a draw, as of questions about one file."""
    for name in "ab":
        frames = [Image.new("RGB", (8, 8), (9 * i, 0, ord(name))) for i in range(5)]
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    lines = [{"video": f"{name}.gif", "question": f"q{i}", "answer": "x"} for i in range(3) for name in "ab"]
    file = put("data.jsonl", "\n".join(map(json.dumps, lines)))
    [task] = load_data([str(file)])
    assert task.groups == [[0, 2, 4], [1, 3, 5]] and [len(one.images) for one in task.samples] == [5] * 6
    assert [len(own) for own in load_data([str(file)], count=3)[0].groups] == [3]


def test_nothing_said_is_not_right_where_an_answer_is_blank(put, tmp_path):
    put("a.png")
    for answers, said in (({"answers": ["", "x", " "]}, ("x",)), ({"answer": "x", "answers": []}, ("x",))):
        [task] = load_data([str(put("data.jsonl", {"image": "a.png", "question": "q"} | answers))])
        [sample] = task.samples
        assert (sample.answer, sample.score("X"), sample.score("")) == (*said, 1, 0)


def test_one_answer_that_is_none_of_several_is_refused(put, tmp_path):
    put("a.png")
    line = {"image": "a.png", "question": "q", "answers": ["crimson", "red"]}
    assert load_data([str(put("data.jsonl", line | {"answer": "red"}))])[0].samples[0].answers == ("crimson", "red")
    file = put("data.jsonl", line | {"answer": "scarlet"})
    with pytest.raises(CodebookError, match=r"data\.jsonl, line 1: its answer is none of its answers: leave one"):
        load_data([str(file)])


def test_letters_with_marks_are_one_text_however_they_are_written(put, tmp_path):
    put("a.png")
    for answer, said in ("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "Caf\u00e9"):
        file = put("data.jsonl", {"image": "a.png", "question": "q", "answer": answer})
        assert load_data([str(file)])[0].samples[0].score(said) == 1


def test_ids_that_repeat_are_refused(put, tmp_path):
    """The last of two would be the answer to both."""
    image = {"id": 0, "file_name": "1.jpg", "height": 8, "width": 8, "caption": "bowl"}
    box, other = ({"image_id": 0, "bbox": [x, 0, 4, 4]} for x in (0, 4))
    for images, boxes, key in (([image], [box, other], "image_id"), ([image, image], [box], "id")):
        put("finetune_refcoco_val.json", {"images": images, "annotations": boxes})
        with pytest.raises(CodebookError, match=rf"finetune_refcoco_val\.json: two records have one {key}; download"):
            load_data([f"refcoco:{tmp_path}"])
    question = {"image_id": 1, "question": "q", "question_id": 5}
    record = {"image_id": 1, "question_id": 5, "answers": [{"answer": "x"}]}
    for asked, answered, file in (([question] * 2, [record], "questions"), ([question], [record] * 2, "annotations")):
        put("v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
        put("v2_mscoco_val2014_annotations.json", {"annotations": answered})
        with pytest.raises(CodebookError, match=rf"{file}\.json: two records have one question_id"):
            load_data([f"vqav2:{tmp_path}"])


def test_odd_line_ends_and_a_mark_at_the_start_are_text(put, tmp_path):
    """U+2028, U+0085 and a byte-order mark are allowed in JSON lines and in MME's texts."""
    put("a.png")
    question = "what\u2028does\u0085it say?"
    line = json.dumps({"image": "a.png", "question": question, "answer": "x"}, ensure_ascii=False)
    [task] = load_data([str(put("data.jsonl", "\ufeff" + line + "\n"))])
    assert [sample.question for sample in task.samples] == [question]
    for category in (*PERCEPTION, *COGNITION):
        put(f"{category}/1.jpg")
        put(f"{category}/1.txt", f"\ufeff{question}\tYes\n")
    assert load_data([f"mme:{tmp_path}"])[0].samples[0].question == question + SHORT


def test_easyvqa(put, tmp_path):
    """Records of the package easy-vqa 1.0: [question, answer, number of the image]."""
    put("test/images/0.png")
    put("test/images/7.png")
    records = [["what is the red shape?", "triangle", 0], ["is there not a black shape in the image?", "yes", 0]]
    put("test/questions.json", [*records, ["what color is the shape?", "teal", 7]])
    tasks = load_data([f"easyvqa:{tmp_path}"])
    assert [task.name for task in tasks] == ["easyvqa shape", "easyvqa yes-no", "easyvqa color"]
    shape, there, color = (task.samples[0] for task in tasks)
    assert (shape.question, shape.images[0].name, color.images[0].name) == (records[0][0], "0.png", "7.png")
    said = ("Triangle.", "The red shape is a triangle.", "circle", "triangle or circle", "")
    assert [shape.score(text) for text in said] == [1, 1, 0, 0, 0]
    assert [there.score(text) for text in ("Yes, no black one", "yes", "No.")] == [0, 1, 0]
    put("test/questions.json", [["what color is the shape?", "pink", 7]])
    with pytest.raises(CodebookError, match=r"are not those of easyvqa: KeyError: .pink"):
        load_data([f"easyvqa:{tmp_path}"])


@pytest.mark.parametrize("odd", [None, 3, [], {}, [[1]], {"a": 1}, "", float("nan")])
def test_another_type_inside_is_one_error(put, tmp_path, odd):
    """Each field of GQA's and RefCOCO's records, and the records themselves, in turn."""
    put("images/1.jpg")
    record = {"imageId": "1", "question": "q", "answer": "a"}
    image = {"id": 0, "file_name": "1.jpg", "height": 8, "width": 8, "caption": "bowl"}
    boxes = {"images": [image], "annotations": [{"image_id": 0, "bbox": [1, 1, 2, 2]}]}
    put("train2014/1.jpg")
    wrong = [("gqa", odd), ("gqa", {"1": odd}), *(("gqa", {"1": record | {key: odd}}) for key in record)]
    wrong += [("refcoco", odd), *(("refcoco", boxes | {key: odd}) for key in boxes)]
    wrong += [("refcoco", boxes | {"images": [image | {key: odd}]}) for key in image]
    wrong += [("refcoco", boxes | {"images": [image | {"height": 0}]})]
    names = {"gqa": "testdev_balanced_questions.json", "refcoco": "finetune_refcoco_val.json"}
    for kind, content in wrong:
        put(names[kind], json.dumps(content))
        try:
            tasks = load_data([f"{kind}:{tmp_path}"])
        except CodebookError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            texts = [(s.question, s.answer) for task in tasks for s in task.samples]
            assert all(isinstance(text, str) for pair in texts for text in pair)


def test_the_miniature_and_a_name_twice():
    tasks = load_data(["miniature"], count=2)
    assert len(tasks) == 11 and all(len(task.samples) == 2 for task in tasks)
    assert tasks[0].samples[0].patches
    with pytest.raises(CodebookError, match="two data sets have a task 'exist'"):
        load_data(["miniature", "miniature"], count=1)


def test_families_of_the_miniature_are_those_of_the_whole():
    whole = {task.name: task for task in load_data(["miniature"], count=2, seed=3)}
    some = load_data(["miniature:ocr", "miniature:multi"], count=2, seed=3)
    assert [task.name for task in some] == ["ocr", "multi"]
    for task in some:
        for own, other in zip(task.samples, whole[task.name].samples, strict=True):
            assert (own.question, own.answer) == (other.question, other.answer)
            assert [a.tobytes() for a in own.images] == [b.tobytes() for b in other.images]
    with pytest.raises(CodebookError, match=r"no task family 'smell'.*exist"):
        load_data(["miniature:smell"], count=1)


def test_what_is_wrong_is_said(put, tmp_path):
    for name, words in {
        "nothing": "no data 'nothing'",
        "gqa": "--data gqa:FOLDER",
        "gqa:nowhere": "no folder nowhere",
        f"vqav2:{tmp_path}": "no file .*questions.json",
    }.items():
        with pytest.raises(CodebookError, match=words):
            load_data([name])
    put("testdev_balanced_questions.json", {"1": {"imageId": "x", "question": "q"}})
    with pytest.raises(CodebookError, match="are not those of gqa"):
        load_data([f"gqa:{tmp_path}"])
    put("testdev_balanced_questions.json", {"1": {"imageId": "x", "question": "q", "answer": "a"}})
    with pytest.raises(CodebookError, match=r"image of gqa is missing: .*x\.jpg"):
        load_data([f"gqa:{tmp_path}"])
    put("a.png")
    file = put("data.jsonl", json.dumps({"image": "a.png", "question": "q"}))
    with pytest.raises(CodebookError, match="has no answer"):
        load_data([str(file)])

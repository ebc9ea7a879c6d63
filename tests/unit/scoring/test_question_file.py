# SPDX-License-Identifier: Apache-2.0
"""Files of public benchmarks become one form of question; anything else is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_keye.errors import UserError
from megatron_keye.scoring.question import user_turn
from megatron_keye.scoring.question_file import read_questions, with_media_from, written
from megatron_keye.scoring.truth import ChoiceTruth, GroundingTruth

MME: dict[str, Any] = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "How many apples?",
    "options": ["A. Two.", "B. Three.", "C. Four.", "D. Five."],
    "answer": "B",
}
SHEET = {
    **{key: MME[key] for key in ("video_id", "duration", "domain", "url")},
    "questions": [{key: MME[key] for key in ("question_id", "question", "options", "answer")}],
}
LONG: dict[str, Any] = {
    "video_id": "86Cx",
    "question": "What is shown after the cat?",
    "candidates": ["A. Lincoln", "a dog", "a bird"],
    "correct_choice": 2,
    "id": "86Cx_0",
    "video_path": "86Cx.mp4",
    "duration_group": 600,
    "duration": 333.5,
}
HIGHLIGHT = {
    "qid": 9,
    "query": "A man waves.",
    "vid": "abc_60_210",
    "duration": 150,
    "relevant_windows": [[20, 30], [40, 152]],
}
ACTIVITY = {
    "v_1": {"duration": 82.5, "timestamps": [[0.8, 20], [30, 90]], "sentences": ["X", "Y"]}
}
MLVU: dict[str, Any] = {
    "video": "movie101_66.mp4",
    "duration": 246,
    "question": "What color is the man?",
    "candidates": ["Yellow", "Red", "Green", "Blue"],
    "answer": "Red",
    "question_type": "plotQA",
}
TEMP: dict[str, Any] = {
    "video_id": "1034419625",
    "question": "What is the man doing?\nA. dunking\nB. dribbling\nC. passing",
    "answer": "B. dribbling",
    "dim": "action",
}
NEXT: dict[str, Any] = {
    "video": "4010069381",
    "frame_count": "369",
    "question": "how do the men play",
    "answer": "2",
    "qid": "6",
    "type": "CH",
    **{f"a{place}": f"way {place}" for place in range(5)},
}
CHARADES = {"video": "3MSZA.mp4", "caption": "person turn a light on.", "timestamp": [24.3, 30.4]}


def put(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_video_mme_in_both_forms(tmp_path: Path) -> None:
    rows = read_questions(put(tmp_path / "rows.jsonl", MME), tmp_path / "videos")
    sheet = read_questions(put(tmp_path / "sheet.json", [SHEET]), tmp_path / "videos")
    assert rows == sheet
    [question] = rows
    assert (question.id, question.length, question.seconds) == ("001-1", "short", None)
    options = ("Two.", "Three.", "Four.", "Five.")
    assert question.truth == ChoiceTruth(letter="B", options=options)
    asked = "How many apples?\nA. Two.\nB. Three.\nC. Four.\nD. Five.\nAnswer with the letter."
    assert question.messages == user_turn("videos/fFjv93ACGo8.mp4", asked)


def test_long_video_bench(tmp_path: Path) -> None:
    [question] = read_questions(put(tmp_path / "lvb_val.json", [LONG]))
    assert question.truth == ChoiceTruth(letter="C", options=tuple(LONG["candidates"]))
    assert (question.id, question.seconds) == ("86Cx_0", 333.5)
    with pytest.raises(UserError, match="lvb.json:1: 'correct_choice': got -1.*validation part"):
        read_questions(put(tmp_path / "lvb.json", [LONG | {"correct_choice": -1}]))


def test_moments_of_three_benchmarks(tmp_path: Path) -> None:
    charades = tmp_path / "charades_sta_test.txt"
    charades.write_text(
        "3MSZA 24.3 30.4##person turn a light on.\n\nAO8RW 0.0 6.9##a person eats.\n"
    )
    first, second = read_questions(charades)
    assert first.truth == GroundingTruth(intervals=((24.3, 30.4),))
    assert [first.id, second.id] == ["1", "3"]
    [video, text] = first.messages[0]["content"]
    assert video == {"type": "video", "video": "3MSZA.mp4"}
    assert '"person turn a light on"' in text["text"]
    [highlight] = read_questions(put(tmp_path / "val.jsonl", HIGHLIGHT))
    assert highlight.truth == GroundingTruth(intervals=((20.0, 30.0), (40.0, 150.0)))
    [one, two] = read_questions(put(tmp_path / "activity.json", ACTIVITY))
    assert (one.id, two.id, two.seconds) == ("v_1-0", "v_1-1", 82.5)
    assert two.truth == GroundingTruth(intervals=((30.0, 82.5),))


def write_rows(path: Path, *records: dict[str, Any]) -> Path:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(list(records)), path)
    return path


def test_tables_in_parquet_ask_what_the_same_records_in_json_ask(tmp_path: Path) -> None:
    options = {f"option{place}": text for place, text in enumerate(LONG["candidates"])}
    long_row = {key: value for key, value in LONG.items() if key != "candidates"} | options
    long_row |= {"option3": "N/A", "option4": "N/A"}
    for record, row in ((MME, MME), (LONG, long_row), (MLVU, MLVU), (TEMP, TEMP), (NEXT, NEXT)):
        of_json = read_questions(put(tmp_path / "a.jsonl", record))
        assert read_questions(write_rows(tmp_path / "a.parquet", row)) == of_json
    text = tmp_path / "charades_sta_test.txt"
    text.write_text("3MSZA 24.3 30.4##person turn a light on.\n")
    assert read_questions(write_rows(tmp_path / "a.parquet", CHARADES)) == read_questions(text)


def test_an_option_given_by_its_text_or_place(tmp_path: Path) -> None:
    part = MLVU | {"start": 3.0, "end": 9.5, "duration": None}
    mlvu, mv_bench = read_questions(put(tmp_path / "a.json", MLVU, part))
    assert mlvu.truth == ChoiceTruth(letter="B", options=tuple(MLVU["candidates"]))
    assert (mlvu.id, mlvu.seconds, mv_bench.id, mv_bench.seconds) == ("1", 246.0, "2", None)
    video = {"type": "video", "video": "movie101_66.mp4", "start": 3.0, "end": 9.5}
    assert mv_bench.messages[0]["content"][0] == video
    names, values = ",".join(NEXT), ",".join(NEXT.values())
    (tmp_path / "val.csv").write_text(f"{names}\n{values}\n")
    [by_place] = read_questions(tmp_path / "val.csv")
    assert (by_place.id, by_place.messages[0]["content"][0]["video"]) == (
        "4010069381-6",
        "4010069381.mp4",
    )
    grounded = values.replace(",2,", ",way 2,", 1)
    (tmp_path / "val.csv").write_text(f"{names.replace('video', 'video_id')}\n{grounded}\n")
    [by_text] = read_questions(tmp_path / "val.csv")
    assert by_text == by_place
    assert isinstance(by_text.truth, ChoiceTruth) and by_text.truth.letter == "C"


def test_temp_compass_in_both_forms(tmp_path: Path) -> None:
    asked = {key: TEMP[key] for key in ("question", "answer")}
    (tmp_path / "multi-choice.json").write_text(json.dumps({"1034419625": {"action": [asked]}}))
    [sheet] = read_questions(tmp_path / "multi-choice.json")
    [row] = read_questions(put(tmp_path / "rows.jsonl", TEMP))
    assert sheet.messages == row.messages
    assert (
        sheet.truth
        == row.truth
        == ChoiceTruth(letter="B", options=("dunking", "dribbling", "passing"))
    )
    assert (sheet.id, row.id) == ("1034419625-action-0", "1")


def test_every_form_is_written_as_questions_of_this_project(tmp_path: Path) -> None:
    files = [
        *(put(tmp_path / "a.jsonl", MME), put(tmp_path / "b.json", [LONG])),
        *(put(tmp_path / "c.jsonl", HIGHLIGHT), put(tmp_path / "d.json", ACTIVITY)),
    ]
    (tmp_path / "out").mkdir()
    for file in files:
        questions = read_questions(file)
        moved = [with_media_from(each, tmp_path, tmp_path / "out") for each in questions]
        assert moved[0].messages[0]["content"][0]["video"].startswith("../")
        out = tmp_path / "out" / "questions.jsonl"
        out.write_text(written(moved))
        again = read_questions(out)
        assert [each.written() for each in again] == [each.written() for each in moved]


def test_what_else_a_record_has_is_kept_or_refused(tmp_path: Path) -> None:
    record = {"messages": list(user_turn("a.mp4", "?")), "task": "count", "truth": {"number": 2}}
    [question] = read_questions(put(tmp_path / "a.jsonl", record | {"fps": 1.0, "kind": "x"}))
    moved = with_media_from(question, tmp_path, tmp_path / "out").written()
    assert (moved["fps"], moved["kind"]) == (1.0, "x")
    assert moved["messages"] == list(user_turn("../a.mp4", "?"))
    turn = {"role": "user", "content": "<video>?"}
    for listed in (
        record | {"videos": ["a.mp4"], "messages": [turn]},
        record | {"messages": [turn | {"videos": ["a.mp4"]}]},
    ):
        [question] = read_questions(put(tmp_path / "b.jsonl", listed))
        with pytest.raises(UserError, match="question '1': has 'videos', expected media in"):
            with_media_from(question, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.jsonl",
            '{"question": "?"}',
            r"a.jsonl:1: got an object with \['question'\], expected",
        ),
        ("a.jsonl", "3", "a.jsonl:1: got int, expected an object"),
        ("a.json", '{"v": {"duration": 3}}', "for 'v', expected an object with"),
        ("a.txt", "3MSZA 24.3##x", "a.txt:1: got '3MSZA 24.3##x', expected VIDEO START END"),
        ("a.txt", "v 1.2.3 4##x", "a.txt:1: got .*expected seconds"),
        ("a.txt", "", "holds no questions"),
        ("a.jsonl", json.dumps(MME | {"duration": "9"}), "'duration': got '9', expected one of"),
        ("a.jsonl", json.dumps(MME | {"answer": "E"}), "a.jsonl:1: 'letter': got 'E'"),
        ("a.jsonl", json.dumps(MME | {"options": "A"}), "'options': got 'A', expected a list"),
        ("a.jsonl", f"{json.dumps(MME)}\n{json.dumps(MME)}", "two questions of the id '001-1'"),
        ("a.jsonl", json.dumps(MLVU | {"answer": "B"}), "'answer': got 'B', expected one of"),
        ("a.jsonl", json.dumps(NEXT | {"answer": "5"}), "'answer': got '5', expected the place"),
        (
            "a.jsonl",
            json.dumps(TEMP | {"question": "Is it red?", "answer": "yes"}),
            "a.jsonl:1: got the question 'Is it red\\?' with the answer 'yes', expected options",
        ),
        ("a.json", '{"v": {"action": [{"question": "?"}]}}', "a.json: v: got keys"),
        ("a.csv", "video,qid\n1,2,3\n", "a.csv:1: got .*expected a value for each column"),
        ("a.csv", "video,qid\n1,2\n", "a.csv:1: got an object with"),
        ("gone.csv", None, "gone.csv: cannot be read as CSV"),
        ("gone.txt", None, "gone.txt: cannot be read"),
        ("gone.json", None, "gone.json: cannot be read"),
    ],
)
def test_what_is_none_of_the_forms_is_refused(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / name)

"""What two runs differ in is named."""

from pipeline.fingerprint import MAX_TOLD, differences

INPUTS = {
    "manifest": "a1",
    "train": {"seed": 1, "augment": {"colour": 0.0, "rand_augment": None}},
    "begins_with": None,
    "code": {"effdet/losses.py": "b1", "effdet/model.py": "c1"},
}


def test_equal_inputs_have_no_differences():
    assert differences(INPUTS, {**INPUTS}) == []


def test_parameters_are_named_with_both_values():
    theirs = {**INPUTS, "train": {"seed": 2, "augment": {"colour": 0.0, "rand_augment": {"layers": 1}}}}
    assert differences(INPUTS, theirs) == [
        "train.augment.rand_augment: None, there nothing",
        "train.augment.rand_augment.layers: nothing, there 1",
        "train.seed: 1, there 2",
    ]


def test_code_and_data_are_named_alone():
    theirs = {**INPUTS, "manifest": "a2", "code": {"effdet/losses.py": "b2", "effdet/new.py": "d1"}}
    assert differences(INPUTS, theirs) == [
        "effdet/losses.py",
        "effdet/model.py",
        "effdet/new.py",
        "data/shards/manifest.json",
    ]


def test_of_many_some_are_named():
    theirs = {**INPUTS, "code": {f"effdet/{i}.py": "x" for i in range(20)}}
    told = differences(INPUTS, theirs)
    assert told[MAX_TOLD:] == ["and 14 more"]  # 2 of ours and 20 of theirs

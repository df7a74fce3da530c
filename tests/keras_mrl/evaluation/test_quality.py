"""A dict that prints as a table."""

import json

from keras_mrl.evaluation import Quality

MEASURES = {8: {"top1": 0.5, "nn1": 0.25}, 128: {"nn1": 1.0}}


def test_it_is_a_dict_and_prints_as_a_table() -> None:
    quality = Quality(MEASURES)
    assert quality == MEASURES
    assert repr(quality) == repr(MEASURES)
    assert json.loads(json.dumps(quality)) == {str(dim): of for dim, of in MEASURES.items()}
    assert str(quality).splitlines() == [
        "dim    top1     nn1",
        "  8  0.5000  0.2500",
        "128       -  1.0000",
    ]
    assert str(Quality()) == "dim"


def test_it_is_turned_round() -> None:
    assert Quality(MEASURES).by_measure() == {"top1": {8: 0.5}, "nn1": {8: 0.25, 128: 1.0}}
    assert list(Quality(MEASURES).by_measure()) == ["top1", "nn1"]

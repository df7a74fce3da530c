"""`keras-mrl regress`: values of files, at one dim."""

from collections.abc import Callable

import numpy as np

from tests.helpers.cli import Ended, lines

Ask = Callable[..., Ended]
ROWS = np.array([[1, 2, 3.5], [0, -1, 1e6]], np.float32)


def test_a_table_of_values_at_the_full_dim(ask: Ask) -> None:
    np.save("two.npy", ROWS)
    assert ask("regress", "prices", "two.npy") == (
        0,
        "FILE        ROW  DIM  VALUES\n"
        "two.npy       0    3  6.5 -6.5\n"
        "two.npy       1    3  999999 -999999\n",
        "",
    )


def test_json_lines_of_values_at_one_dim(ask: Ask) -> None:
    np.save("two.npy", ROWS)
    status, out, err = ask("regress", "prices", "two.npy", "--dim=1", "--json")
    assert (status, err) == (0, "")
    assert lines(out) == [
        {"file": "two.npy", "row": 0, "dim": 1, "values": [1.0, -1.0]},
        {"file": "two.npy", "row": 1, "dim": 1, "values": [0.0, 0.0]},
    ]


def test_a_model_without_values_is_refused(ask: Ask) -> None:
    np.save("x.npy", ROWS)
    assert ask("regress", "rows", "x.npy") == (
        1,
        "",
        "keras-mrl: Only a regressor answers with values. Received: a request for those of model "
        "'rows', a classifier. Ask it to classify; keras-mrl export --activation none makes a "
        "regressor.\n",
    )
    status, out, err = ask("regress", "prices", "x.npy", "--dim=2")
    assert (status, out) == (1, "")
    assert "Received: dim=2" in err

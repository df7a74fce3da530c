"""An orthogonal projection of embeddings that were not trained Matryoshka: made, applied, saved.

The first coordinates of such embeddings mean no more than any others. A rotation can order them.
It changes no cosine, no dot product and no distance at the full width, so answers and thresholds of
the application stay as they are; only prefixes change. `Projection` applies one, in NumPy alone.
`principal_directions` makes the one of principal components; `keras_mrl.MatryoshkaAdaptor` learns
better ones.

A folder holds a projection: `projection.json` names its fingerprint, under which the directions lie
beside it. So a writer that is interrupted leaves the projection that was there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .corpus import EmbeddingFile, digest, windows
from .embeddings import check_finite, inverse_length
from .errors import DamagedIndexError, EncoderMismatchError, ManifestError
from .inputs import as_float32
from .integers import check_dims
from .results import Embedded, Neighbors
from .untrusted import JSON_BYTES, UntrustedFileError, parse_json, read_array, read_bytes
from .version import __version__

if TYPE_CHECKING:
    from .funnel import FunnelSchedule
    from .index.base import Index

Vectors = npt.NDArray[np.float32]

CARD = "projection.json"
FORMAT = 1
_ROWS_AT_ONCE = 8192  # that are read, scaled and multiplied in memory
_ORTHOGONAL = 1e-5  # how far products of directions may be from those of orthonormal ones


@dataclass(frozen=True, eq=False)
class Projection:
    """Orthonormal directions of embeddings, the most useful first.

    Args:
        components: The directions, one a row; as many as the embeddings are wide make a rotation,
            which changes no cosine. Copied as float32.
        dims: Prefix lengths that the directions were made for, the last at most their number.
        method: How they were made: "pca", "listwise" or "pairwise".
        encoder_fingerprint: Fingerprint of the model that makes the embeddings, from its manifest;
            None if it is not known.

    Shapes:
        components: `(number, width)`, `number <= width`.

    Raises:
        ValueError: If `components` are no orthonormal rows, or `dims` no dims of theirs.

    Examples:
        >>> turned = Projection(np.eye(4)[::-1], dims=(2, 4))
        >>> turned.transform([[1.0, 2.0, 3.0, 4.0]], dim=2).tolist()
        [[4.0, 3.0]]
        >>> turned.width, turned.is_rotation
        (4, True)
    """

    components: npt.NDArray[Any]
    dims: tuple[int, ...]
    method: str = "pca"
    encoder_fingerprint: str | None = None

    def __post_init__(self) -> None:
        """Check the directions and the dims."""
        components = np.array(as_float32("components", self.components))
        shape = components.shape
        is_table = components.ndim == 2 and 0 < shape[0] <= shape[1]
        gram = components @ components.T if is_table else np.full((1, 1), np.nan)
        if not np.abs(gram - np.eye(len(gram))).max() <= _ORTHOGONAL:
            raise ValueError(
                "components must be orthonormal rows, at most as many as they are wide. "
                f"Received: shape {shape}"
                + (
                    f", whose products differ by {np.abs(gram - np.eye(len(gram))).max():.2g} from "
                    "those of orthonormal ones"
                    if is_table
                    else ""
                )
                + ". Take numpy.linalg.qr(matrix.T)[0].T, or fit a MatryoshkaAdaptor."
            )
        dims = check_dims(self.dims)
        if dims[-1] > len(components):
            raise ValueError(
                "dims must not exceed the number of directions. "
                f"Received: dims={dims} for {len(components)} directions. Drop the dims above it."
            )
        components.flags.writeable = False
        object.__setattr__(self, "components", components)
        object.__setattr__(self, "dims", dims)

    @property
    def width(self) -> int:
        """Width of the embeddings that are projected."""
        return self.components.shape[1]

    @property
    def is_rotation(self) -> bool:
        """Whether there are as many directions as the embeddings are wide."""
        return len(self.components) == self.width

    @property
    def fingerprint(self) -> str:
        """What an index of projected embeddings has as `encoder_fingerprint`.

        It is of the directions and of the encoder's fingerprint together.
        """
        encoder = json.dumps([self.encoder_fingerprint, *self.components.shape]).encode()
        values = self.components.astype("<f4").tobytes()
        return hashlib.sha256(encoder + values).hexdigest()

    def transform(self, embeddings: npt.ArrayLike, dim: int | None = None) -> Vectors:
        """Return projected embeddings, not scaled.

        Args:
            embeddings: Raw or scaled, `(..., width)`.
            dim: How many coordinates are returned; None for one of each direction.

        Shapes:
            Returns float32 `(..., dim)`.

        Raises:
            ValueError: If they are of another width, or not finite, or there are fewer directions.

        Examples:
            >>> Projection([[0.6, 0.8]], dims=(1,)).transform([3.0, 4.0]).tolist()
            [5.0]
        """
        kept = self._first(dim)
        vectors = as_float32("Embeddings", embeddings)
        if vectors.ndim == 0 or vectors.shape[-1] != self.width:
            raise ValueError(
                "Embeddings must be as wide as those the projection was made of. "
                f"Received: shape {vectors.shape} for a width of {self.width}. "
                "Give whole embeddings of the same model."
            )
        check_finite("Embeddings", vectors)
        return np.asarray(vectors @ kept.T)

    def transform_to_file(
        self,
        embeddings: npt.NDArray[Any],
        path: str | os.PathLike[str],
        dim: int | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> Vectors:
        """Write projected embeddings to an `.npy` file; go on there after an interruption.

        Args:
            embeddings: `(rows, width)`; memory-mapped ones may be larger than the memory.
            path: The file. Until it is whole it is called `PATH.partial`.
            dim: How many coordinates are written; None for one of each direction.
            progress: Called with the rows done and the rows in all.

        Returns:
            The file's rows, memory-mapped, float32 `(rows, dim)`.

        Raises:
            FileExistsError: If the file is there.
            EncoderMismatchError: If it was begun with another projection.
            ValueError: As `transform`, or if the file was begun with other rows or another dim.

        Examples:
            >>> import tempfile
            >>> path = tempfile.mkdtemp() + "/projected.npy"
            >>> Projection(np.eye(3), dims=(3,)).transform_to_file(np.ones((5, 3)), path, 2).shape
            (5, 2)
        """
        size = len(self._first(dim))
        rows = np.asanyarray(embeddings)
        if rows.ndim != 2:
            raise ValueError(
                "Embeddings of a file must be (rows, width). "
                f"Received: shape {rows.shape}. Give for example np.load(path, mmap_mode='r')."
            )
        specs = {"embeddings": {"dtype": "float32", "shape": [None, rows.shape[1]]}}
        corpus = digest(rows, specs)
        with EmbeddingFile(path, size, self.fingerprint, corpus) as file:
            for window in file.missing(windows(rows, specs, _ROWS_AT_ONCE)):
                projected = self.transform(window["embeddings"], size)
                file.append(Embedded(projected, self.fingerprint), window)
                if progress is not None:
                    progress(file.rows, len(rows))
            return file.finish()

    def bind(self, index: Index) -> ProjectedIndex:
        """Return an index of projected embeddings that is searched by embeddings as they are.

        A client takes it: it embeds by the encoder, and the projection follows here.

        Args:
            index: Built of embeddings that this projection made, with its fingerprint.

        Raises:
            TypeError: If it is no index of this process, such as a client of a served one.
            EncoderMismatchError: If it was built of other embeddings, or does not say of which.

        Examples:
            >>> from keras_mrl_serving import ExactIndex, FunnelSchedule
            >>> turned = Projection(np.eye(4)[::-1], dims=(2, 4))
            >>> index = ExactIndex.build(
            ...     turned.transform(np.eye(4)),
            ...     FunnelSchedule((2, 4), (3,), 1),
            ...     encoder_fingerprint=turned.fingerprint,
            ... )
            >>> turned.bind(index).search(np.eye(4)[:2]).ids.tolist()
            [[0], [1]]
        """
        if not hasattr(index, "encoder_fingerprint"):
            raise TypeError(
                "A projection is bound to an index in this process. "
                f"Received: {type(index).__name__}. Open one with open_index(folder); ask a served "
                "one by client.search(projection.transform(embeddings), "
                "encoder=projection.fingerprint)."
            )
        if index.encoder_fingerprint != self.fingerprint:
            raise EncoderMismatchError(
                "Projected queries are searched in an index of embeddings that the same projection "
                f"made. Received: an index built with {index.encoder_fingerprint!r} for the "
                f"projection with fingerprint {self.fingerprint!r}. Build it of "
                "projection.transform(gallery), with encoder_fingerprint=projection.fingerprint."
            )
        return ProjectedIndex(self, index)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the projection to a folder, which may hold other files, too.

        Raises:
            OSError: If it cannot be written there.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        card = {
            "format": FORMAT,
            "made_with": __version__,
            "method": self.method,
            "dims": list(self.dims),
            "encoder_fingerprint": self.encoder_fingerprint,
            "fingerprint": self.fingerprint,
        }
        directions = folder / _file_name(self.fingerprint)
        new = folder / f"{directions.name}.new"
        with open(new, "wb") as file:
            np.save(file, self.components.astype("<f4"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, directions)
        new_card = folder / f"{CARD}.new"
        with open(new_card, "w", encoding="utf-8") as text:
            json.dump(card, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        os.replace(new_card, folder / CARD)
        for other in folder.glob("components-*.npy"):
            if other != directions:
                other.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Projection:
        """Return the projection that a folder holds.

        Raises:
            FileNotFoundError: If it holds none.
            DamagedIndexError: If it is not as it was written.
            ManifestError: If a later version of keras-mrl wrote it.

        Examples:
            >>> import tempfile
            >>> folder = tempfile.mkdtemp()
            >>> Projection(np.eye(3), dims=(2, 3)).save(folder)
            >>> Projection.load(folder).dims
            (2, 3)
        """
        folder = Path(path)
        try:
            card = parse_json(read_bytes(folder / CARD, JSON_BYTES, within=folder))
            if card["format"] != FORMAT:
                raise ManifestError(
                    f"This version of keras-mrl reads projections of format {FORMAT}. "
                    f"Received: {os.fspath(folder)!r} of format {card['format']!r:.80}. "
                    "Install the version of keras-mrl that wrote it, or a later one."
                )
            components = read_array(folder / _file_name(card["fingerprint"]), within=folder)
            names = str(card["method"]), card["encoder_fingerprint"]
            projection = cls(components, tuple(card["dims"]), *names)
            if projection.fingerprint != card["fingerprint"]:
                raise ValueError("the directions have changed")
        except (FileNotFoundError, NotADirectoryError) as error:
            if (folder / CARD).exists():
                raise _damaged(folder, "no directions beside it") from error
            raise FileNotFoundError(
                f"A projection is a folder with a file {CARD}. Received: {os.fspath(folder)!r}, "
                "which has none. Make one: MatryoshkaAdaptor(dims).fit(X).save(folder), or "
                "`keras-mrl adapt --help`."
            ) from error
        except ManifestError:
            raise
        except UntrustedFileError as error:
            raise _damaged(folder, str(error)) from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(folder, f"{CARD} or directions that do not read ({error})") from error
        return projection

    def _first(self, dim: int | None) -> Vectors:
        """Return the directions of the first `dim` coordinates."""
        if dim is None:
            return self.components
        (number,) = check_dims((dim,))
        if number > len(self.components):
            raise ValueError(
                "dim must not exceed the number of directions. "
                f"Received: dim={dim} for {len(self.components)}. "
                "Ask for fewer coordinates, or fit with a larger max_dim."
            )
        return self.components[:number]


class ProjectedIndex:
    """An index of projected embeddings, searched by embeddings as their encoder makes them.

    Made by `Projection.bind`. Its `encoder_fingerprint` is that of the encoder, so that a client
    checks the encoder and not the projection, which `bind` has checked.

    Args:
        projection: What the index was built with.
        index: The index of projected embeddings.

    Examples:
        >>> [name for name in dir(ProjectedIndex) if not name.startswith("_")]
        ['encoder_fingerprint', 'metric', 'prepare_filter', 'prompt', 'schedule', 'search', 'width']
    """

    def __init__(self, projection: Projection, index: Index) -> None:
        self.projection = projection
        self.index = index

    @property
    def schedule(self) -> FunnelSchedule:
        """The funnel that is searched."""
        return self.index.schedule

    @property
    def metric(self) -> str:
        """How embeddings are compared: "cosine", "dot" or "l2"."""
        return self.index.metric

    @property
    def encoder_fingerprint(self) -> str | None:
        """Fingerprint of the model that makes the queries; None if it is not known."""
        return self.projection.encoder_fingerprint

    @property
    def prompt(self) -> str | None:
        """The prompt that stood before each text of the gallery; None without one."""
        return self.index.prompt

    @property
    def width(self) -> int:
        """Dim the queries are embedded at, before they are projected."""
        return self.projection.width

    def __len__(self) -> int:
        return len(self.index)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int | None = None,
        among: npt.ArrayLike | None = None,
        filter: Any = None,
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, as `Index.search`.

        Args:
            queries: Embeddings `(batch, width)`, not projected.
            k: Number of neighbours; None for as many as the funnel returns.
            among: The only ids that may be returned; None: all.
            filter: What `prepare_filter` returned; None: all.
        """
        projected = self.projection.transform(queries, self.index.width)
        return self.index.search(projected, k, among, filter)

    def prepare_filter(self, only: Any) -> Any:
        """Return a filter for any number of searches, as `prepare_filter` of the index."""
        return self.index.prepare_filter(only)


def principal_directions(
    embeddings: npt.NDArray[Any],
    number: int | None = None,
    after: Vectors | None = None,
) -> npt.NDArray[np.float64]:
    """Return the directions that hold the most of embeddings of unit length, one a row.

    They are not centred: to centre changes cosines, and on all-MiniLM-L6-v2 it caps the recall of
    full-width neighbours at .82. The largest entry of each is positive. The memory grows with the
    square of the width and not with the rows, which may be memory-mapped.

    Args:
        embeddings: `(rows, width)`; each row is scaled to unit length here.
        number: How many directions; None for as many as the width.
        after: Orthonormal directions that come first: the others are those of what is left, and
            `number` counts both.

    Returns:
        float64 `(number, width)`.

    Raises:
        ValueError: If embeddings are no finite `(rows, width)` with a row, or too narrow.

    Reference:
        Deerwester et al., Indexing by Latent Semantic Analysis, 1990 (components without a mean).

    Examples:
        >>> rows = np.outer(np.arange(1.0, 5.0), [0.6, 0.8])
        >>> principal_directions(rows).round(3).tolist()
        [[0.6, 0.8], [0.8, -0.6]]
        >>> principal_directions(rows, after=np.float32([[1.0, 0.0]])).round(3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    width = check_rows(embeddings, number)
    number = width if number is None else number
    first = np.zeros((0, width)) if after is None else np.asarray(after, np.float64)
    if number <= len(first):
        return first[:number]
    gram = np.zeros((width, width))
    for start in range(0, len(embeddings), _ROWS_AT_ONCE):
        block = unit_rows(embeddings[start : start + _ROWS_AT_ONCE])
        gram += block.T @ block
    if after is None:
        directions = np.linalg.eigh(gram)[1][:, ::-1][:, :number].T
    else:
        # A basis of what the first directions leave, in which the products are eigen-decomposed.
        rest = np.linalg.qr(first.T, mode="complete")[0][:, len(first) :]
        inner = np.linalg.eigh(rest.T @ gram @ rest)[1][:, ::-1]
        directions = (rest @ inner).T[: number - len(first)]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    directions = directions * np.where(largest < 0, -1, 1)
    return np.concatenate([first, directions])


def check_rows(embeddings: npt.NDArray[Any], number: int | None = None) -> int:
    """Return the width of embeddings `(rows, width)` without reading their values.

    Raises:
        ValueError: If they are no table of numbers with at least one row, or narrower than
            `number`.

    Examples:
        >>> check_rows(np.zeros((5, 3)))
        3
    """
    shape = np.shape(embeddings)
    is_table = len(shape) == 2 and all(shape) and np.asarray(embeddings[:1]).dtype.kind in "fiu"
    if not is_table or (number or 1) > shape[1]:
        raise ValueError(
            "Embeddings must be numbers (rows, width), at least one row, and as wide as there are "
            f"directions. Received: shape {shape}"
            + ("" if number is None else f" for {number} directions")
            + ". Give whole embeddings, such as np.load(path, mmap_mode='r')."
        )
    return int(shape[1])


def unit_rows(embeddings: npt.ArrayLike) -> Vectors:
    """Return embeddings `(rows, width)` as float32 of unit length; zeros stay zeros.

    Raises:
        ValueError: If a value is not finite.

    Examples:
        >>> unit_rows([[3.0, 4.0]]).round(3).tolist()
        [[0.6000000238418579, 0.800000011920929]]
    """
    rows = as_float32("Embeddings", embeddings)
    check_finite("Embeddings", rows)
    return np.asarray(rows * inverse_length(np.einsum("rd,rd->r", rows, rows))[:, None])


def nested_dims(dims: Sequence[int], width: int, max_dim: int | None) -> tuple[int, ...]:
    """Return the dims of a projection, checked.

    Args:
        dims: Prefix lengths.
        width: Of the embeddings.
        max_dim: How many directions there are to be; None for as many as the width.

    Raises:
        ValueError: If `dims` are no dims, or one exceeds `max_dim` or the width.

    Examples:
        >>> nested_dims([16, 64], width=384, max_dim=None)
        (16, 64)
    """
    checked = check_dims(dims)
    most = width if max_dim is None else min(check_dims((max_dim,))[0], width)
    if checked[-1] > most:
        raise ValueError(
            "dims must not exceed the number of directions: max_dim, or the width. "
            f"Received: dims={checked} for {most} directions. Drop the dims above it."
        )
    return checked


def _file_name(fingerprint: Any) -> str:
    if not (isinstance(fingerprint, str) and len(fingerprint) == 64 and fingerprint.isalnum()):
        raise ValueError("its fingerprint is none")
    return f"components-{fingerprint[:16]}.npy"


def _damaged(folder: Path, received: str) -> DamagedIndexError:
    return DamagedIndexError(
        "A projection is read as it was written. "
        f"Received: {os.fspath(folder)!r} with {received}. "
        "Copy it again from where it is whole, or fit it anew."
    )

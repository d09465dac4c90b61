"""What a recogniser knows: how far a face is from the faces that it was made for.

Any crop gets an embedding, also a shoulder, a face on its side, or a photograph shown to a recogniser of drawn heads,
and the embedding alone does not show it. Out of its world a network's features fall away from the directions in which
faces differ (Lee et al., 2018, arXiv:1807.03888): the squared Mahalanobis distance of embedding, pooled feature maps,
points and detection score tells. `known.npz` beside the ONNX files holds the statistics; a recogniser without it (a pack
of insightface, made for photographs) judges nothing.

Axes: B faces, D values that describe a face, K principal directions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

FILE = "known.npz"
DIRECTIONS, RIDGE = 250, 0.01


def fingerprint(model_file: str | Path) -> str:
    """20 hex digits of SHA-256 over a recognition model's file."""
    with open(model_file, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:20]


class Recogniser:
    """insightface's recognition model; where its folder holds `known.npz`, its embeddings come with a distance."""

    def __init__(
        self, model: Any, options: onnxruntime.SessionOptions, providers: Sequence[str], maps: Sequence[str] = ()
    ) -> None:
        self._model, self.model_file = model, str(model.model_file)
        self.input_mean, self.input_std = float(model.input_mean), float(model.input_std)
        path = Path(model.model_file).parent / FILE
        self._known = KnownFaces.load(path) if path.exists() else None
        if self._known and self._known.recogniser != fingerprint(self.model_file):
            raise ValueError(
                f"{path} was measured with another recogniser than {self.model_file}: delete it, or measure anew"
            )
        self._maps = list(self._known.maps if self._known else maps)
        if self._maps:
            import onnx
            import onnxruntime

            graph = onnx.load(model.model_file)
            shown = {output.name for output in graph.graph.output}
            graph.graph.output.extend(
                onnx.helper.make_empty_tensor_value_info(name) for name in self._maps if name not in shown
            )
            model.session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=list(providers))

    @property
    def sure(self) -> float:
        """A distance below which no further look is needed."""
        return self._known.sure if self._known else 1.0

    def embed(self, crops_BHW3: Sequence[Pixels]) -> Floats:
        """Embeddings (B, E) of BGR crops."""
        return np.asarray(self._model.get_feat(list(crops_BHW3)), np.float32)

    def look(self, crop_HW3: Pixels, placed_52: Floats, score: float) -> tuple[Floats, float]:
        """Embedding (E,) of a BGR crop and its distance: up to 1 is known, 0 where nothing is known about distances.

        placed_52: the face's points in the crop; score: of its detection.
        """
        if self._known is None:
            return self.embed([crop_HW3])[0], 0.0
        embedding, values = self.describe(crop_HW3, placed_52, score)
        return embedding, float(self._known.distances(values[None])[0])

    def describe(self, crop_HW3: Pixels, placed_52: Floats, score: float) -> tuple[Floats, Floats]:
        """Embedding (E,) and what its distance is measured with (D,): embedding, mean and deviation of each channel, points, score."""
        model = self._model
        mean = (model.input_mean,) * 3
        blob = cv2.dnn.blobFromImage(crop_HW3, 1.0 / model.input_std, model.input_size, mean, swapRB=True)
        outputs = model.session.run([model.output_names[0], *self._maps], {model.input_name: blob})
        embedding = outputs[0][0]
        pooled = [stat for features in outputs[1:] for stat in (features[0].mean((1, 2)), features[0].std((1, 2)))]
        pooled_log = np.log(np.maximum(np.concatenate(pooled), 0) + 0.02)
        doubt = np.log(1.0001 - min(score, 1.0))
        return embedding, np.concatenate([embedding, pooled_log, placed_52.reshape(-1), [doubt]]).astype(np.float32)


class KnownFaces:
    """A normal distribution of described faces: its K widest directions, and one variance for the rest.

    recogniser: the fingerprint of the model whose embeddings they are.
    """

    def __init__(
        self,
        maps: Sequence[str],
        arrays: Mapping[str, Floats],
        limit: float = 1.0,
        sure: float = 1.0,
        recogniser: str = "",
    ) -> None:
        self.maps, self._arrays, self.limit, self.sure = list(maps), dict(arrays), limit, sure
        self.recogniser = recogniser

    @classmethod
    def fit(cls, maps: Sequence[str], values_BD: Floats, photographs_BD: Floats, embedding: int) -> KnownFaces:
        """From described faces; `calibrate` sets the limits. embedding: how many of the D values are the embedding."""
        # One scale for the embedding, one for the feature maps, for points and score: within each the units are the same.
        group_D = np.repeat([0, 1, 2, 3], [embedding, values_BD.shape[1] - embedding - 11, 10, 1])
        deviation_D = values_BD.std(0)
        scale_D = np.array([1 / deviation_D[group_D == group].mean() for group in group_D])
        mean_D = values_BD.mean(0)
        variances, vectors = np.linalg.eigh(np.cov(((values_BD - mean_D) * scale_D).T.astype(np.float64)))
        widest = np.argsort(-variances)
        kept, left = widest[:DIRECTIONS], widest[DIRECTIONS:]
        rest = float(variances[left].mean())
        # With v, V a direction and its variance: distance² = (|c|² - sum of (v·c)² (1 - rest / V)) / rest.
        basis_KD = (vectors[:, kept] * np.sqrt(1 - rest / variances[kept])).T
        # Linear discriminant analysis, with a ridge; in deviations of drawn faces.
        drawn_BD, strange_BD = (values_BD - mean_D) * scale_D, (photographs_BD - mean_D) * scale_D
        within_DD = np.cov(drawn_BD.T) + np.cov(strange_BD.T)
        within_DD += RIDGE * np.trace(within_DD) / len(within_DD) * np.eye(len(within_DD))
        photograph_D = np.linalg.solve(within_DD, strange_BD.mean(0))
        photograph_D /= (drawn_BD @ photograph_D).std()
        arrays = {
            "mean": mean_D,
            "scale": scale_D,
            "basis": basis_KD,
            "photograph": photograph_D,
            "rest": np.array(rest),
        }
        return cls(maps, {name: array.astype(np.float32) for name, array in arrays.items()})

    def distances(self, values_BD: Floats) -> NDArray[np.float64]:
        """(B,) squared Mahalanobis distances in units of the limit, times e^0.1 a deviation towards photographs."""
        a = self._arrays
        centred_BD = (values_BD - a["mean"]) * a["scale"]
        along_BK = centred_BD @ a["basis"].T
        square_B = (centred_BD**2).sum(1, dtype=np.float64) - (along_BK**2).sum(1, dtype=np.float64)
        towards_B = np.maximum(centred_BD @ a["photograph"], 0)
        return np.asarray(square_B / a["rest"] * np.exp(0.1 * towards_B) / self.limit, np.float64)

    def calibrate(self, values_BD: Floats, limit: float, sure: float) -> None:
        """limit, sure: shares of these faces that are within the limit, and that need no further look."""
        self.limit = 1.0
        limit_distance, sure_distance = np.quantile(self.distances(values_BD), [limit, sure])
        self.limit, self.sure = float(limit_distance), float(sure_distance / limit_distance)

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {
            **self._arrays,
            "limits": np.array([self.limit, self.sure]),
            "maps": np.array(self.maps),
            "recogniser": np.array(self.recogniser),
        }
        arrays["basis"] = arrays["basis"].astype(np.float16)
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> KnownFaces:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        (limit, sure), maps, recogniser = arrays.pop("limits"), arrays.pop("maps"), arrays.pop("recogniser")
        floats = {name: array.astype(np.float32) for name, array in arrays.items()}
        return cls([str(name) for name in maps], floats, float(limit), float(sure), str(recogniser))

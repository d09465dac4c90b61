"""Canonical SVD form: equal weight updates get equal vectors, and neighbours stay neighbours.

Only the product B A acts on a layer, and B A = (B M^-1)(M A) for every invertible (R, R) matrix M: infinitely many
vectors mean the same LoRA. The canonical form keeps one of them. With the singular value decomposition
B A = U diag(s) V^T, s in falling order,

    A' = diag(sqrt(s)) V^T        B' = U diag(sqrt(s))

(LoRA Diffusion, arXiv:2412.02352, "multiplied out and split again by SVD"; that A and B share s evenly is our choice:
both then have the norm sqrt(s_j), and neither blows up). What is left open is one sign for each component:
(a, b) and (-a, -b) have the same product. The customary "make the largest entry positive" tears the space: where two
entries tie, a tiny change swaps which one is largest, and the vector jumps to its negative. Here a fixed *reference*
vector decides, one and the same for a whole corpus: the sign that makes the component point its way,
`<v_j, v_ref_j> + <u_j, u_ref_j> >= 0`.

Degenerate cases, by nature of the SVD:
- Equal singular values s_j = s_{j+1} (rank > 1): any rotation of the two components is as good. Near such a tie the
  form changes fast with the vector; the update does not. Rank 1 has no such case.
- s_j = 0: the component is zero in A' and B'. A vector with B = 0 (the start of a fine-tuning) becomes all zero.
- A component at a right angle to the reference's: its sign is decided by rounding. A reference amid the corpus (its
  mean, or the start vector that all fine-tunings share) keeps vectors far from there.

Axes: K identities together, N vector length, R rank, I / O features in / out.
"""

import torch
from torch import Tensor

from lora_diffusion.lora.layout import LoRALayout


@torch.no_grad()
def canonicalize(vectors_KN: Tensor, layout: LoRALayout, reference_N: Tensor) -> Tensor:
    """The canonical vectors (K, N) of `vectors_KN`: same updates B A, one representative of each.

    `reference_N` (N,) only decides signs; it is oriented by its own A and B, so a canonical reference stays as it is.
    Its A or its B may be zero, as in the start vector of a fine-tuning (B = 0): the other one then decides.
    Works in float32 or float64 and on the device of `vectors_KN`, never forms an (O, I) matrix, carries no gradient.

    Raises:
        ValueError: wrong shapes, or values that are not finite (a diverged LoRA has no SVD).
    """
    layout.check(vectors_KN)
    if reference_N.shape != (layout.size,):
        raise ValueError(
            f"the reference has shape {tuple(reference_N.shape)}; expected one vector ({layout.size},), for example "
            "the mean of the corpus or the vector that every fine-tuning starts from"
        )
    for name, values in (("vectors", vectors_KN), ("reference", reference_N)):
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"the {name} hold NaN or infinity; drop diverged LoRAs before the canonical form")
    dtype = torch.float64 if vectors_KN.dtype == torch.float64 else torch.float32
    references = layout.split(reference_N.to(vectors_KN.device, dtype)[None])
    canonical = {}
    for name, (A_KRI, B_KOR) in layout.split(vectors_KN.to(dtype)).items():
        U_KOR, s_KR, V_KIR = svd_of_product(A_KRI, B_KOR)
        u_ref_OR, v_ref_IR = _reference_directions(*references[name])
        sign_KR = torch.where((U_KOR * u_ref_OR).sum(1) + (V_KIR * v_ref_IR).sum(1) < 0, -1.0, 1.0).to(dtype)
        root_KR = s_KR.sqrt()
        canonical[name] = (
            (V_KIR * (sign_KR * root_KR)[:, None]).transpose(1, 2),
            U_KOR * (sign_KR * root_KR)[:, None],
        )
    return layout.join(canonical).to(vectors_KN.dtype)


def svd_of_product(A_KRI: Tensor, B_KOR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (K, O, R), s (K, R), V (K, I, R) with B A = U diag(s) V^T, from the QR of the factors: only (R, R) SVDs."""
    if A_KRI.shape[1] == 1:  # Rank 1 is a normalisation; LAPACK in small pieces is slower.
        a_norm_K11, b_norm_K11 = A_KRI.norm(dim=2, keepdim=True), B_KOR.norm(dim=1, keepdim=True)
        tiny = torch.finfo(A_KRI.dtype).tiny
        s_K1 = (a_norm_K11 * b_norm_K11)[:, :, 0]
        return B_KOR / b_norm_K11.clamp_min(tiny), s_K1, (A_KRI / a_norm_K11.clamp_min(tiny)).transpose(1, 2)
    Q_A_KIR, R_A_KRR = torch.linalg.qr(A_KRI.transpose(1, 2))
    Q_B_KOR, R_B_KRR = torch.linalg.qr(B_KOR)
    U_KRR, s_KR, Vt_KRR = torch.linalg.svd(R_B_KRR @ R_A_KRR.transpose(1, 2))
    return Q_B_KOR @ U_KRR, s_KR, Q_A_KIR @ Vt_KRR.transpose(1, 2)


def _reference_directions(A_1RI: Tensor, B_1OR: Tensor) -> tuple[Tensor, Tensor]:
    """Unit directions u_ref (O, R) and v_ref (I, R) of the reference's components, oriented as its own A and B point.

    A zero A (or B) gives zero directions, which leaves the decision to the other side.
    """
    U_1OR, _, V_1IR = svd_of_product(A_1RI, B_1OR)
    u_OR = U_1OR[0] * bool(B_1OR.any())
    v_IR = V_1IR[0] * bool(A_1RI.any())
    own_R = (u_OR * B_1OR[0]).sum(0) + (v_IR * A_1RI[0].T).sum(0)
    sign_R = torch.where(own_R < 0, -1.0, 1.0).to(u_OR.dtype)
    return u_OR * sign_R, v_IR * sign_R

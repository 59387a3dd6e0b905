"""What is minimised on tokens that a model drew itself: policy gradients, distillation from teachers, preferences.

With lp the log-prob of a drawn token t under the model, lp_prox that before the first update on it (lp itself, held
fixed, where there is one update), lp_gen that under the engine that drew it, maybe with older weights:

    r_t = exp(lp - lp_prox)
    w_t = exp(lp_prox - lp_gen), held fixed, and corrected: `Correction`
    L   = -(1/N) sum of m_t w_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t)   +  kl * (1/N) sum of m_t k3_t
    k3  = exp(d) - d - 1,  d = lp_ref - lp

m_t is `batch.weights["policy"]` and N its sum over the whole update: every drawn token has the same say. In the first
update of a step r_t = 1, and the clip holds nothing back. Sources: Nemotron 3 Super (arXiv 2604.12374) and Ultra (arXiv
2606.15007), the public code of NeMo-RL, and for k3 http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nautilus.config import setting
from nautilus.data.batch import Batch
from nautilus.model.language import Language
from nautilus.ops.loss import token_logprob, weighted_nll
from nautilus.train.objective import Objective, Pairs, depth_weights
from nautilus.train.shared import hidden_of

BOUNDS = {"none": (0.0, math.inf), "truncate": (0.0, 5.0), "mask": (0.5, 5.0), "sequence": (0.999, 1.002)}


@dataclass(frozen=True, kw_only=True)
class Correction:
    """What a weight w = exp(lp_prox - lp_gen) becomes.

    | kind | | [least, most], where not given |
    |--|--|--|
    | `none` | 1, whatever it is | |
    | `truncate` | within [least, most] | [0, 5] |
    | `mask` | itself within [least, most], 0 outside | [0.5, 5] |
    | `sequence` | itself where exp of the row's mean of log w is within [least, most], 0 elsewhere | [0.999, 1.002] |

    A weight that is no number is 0. With all kinds a row is 0 as a whole whose mean of exp |log w| is more than `apart`
    (inf: none is). (`truncate` is TIS, `mask` IcePop, `sequence` seq-mask-tis of the public code, `apart` its log-prob
    threshold of sequences.)
    """

    kind: str = "truncate"
    least: float | None = None
    most: float | None = None
    apart: float = 2.0

    def __post_init__(self):
        if self.kind not in BOUNDS:
            raise ValueError(f"correction {self.kind!r} was asked for; there are none, truncate, mask and sequence")
        least, most = self.bounds
        if not 0 <= least <= 1 <= most:
            raise ValueError(
                f"weights within [{least}, {most}] were asked for; 1, that of an engine that agrees, must be among them"
            )
        if not self.apart >= 1:
            raise ValueError(f"apart={self.apart} was asked for; an engine that agrees is at 1: give more, 1e9 for any")

    @property
    def bounds(self) -> tuple[float, float]:
        least, most = BOUNDS[self.kind]
        return least if self.least is None else self.least, most if self.most is None else self.most

    def of(self, log_weight_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """No gradient passes."""
        log_weight_BT = log_weight_BT.detach()
        far_B1 = row_mean(log_weight_BT.abs().exp(), mask_BT)
        return self.token_weights(log_weight_BT, mask_BT).masked_fill(far_B1 > self.apart, 0)

    def token_weights(self, log_weight_BT: Tensor, mask_BT: Tensor) -> Tensor:
        least, most = self.bounds
        weight_BT = torch.exp(log_weight_BT).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.kind == "none":
            return torch.ones_like(weight_BT)
        if self.kind == "truncate":
            return weight_BT.clamp(least, most)
        judged = weight_BT if self.kind == "mask" else row_mean(log_weight_BT, mask_BT).exp()
        return weight_BT * ((judged >= least) & (judged <= most))


def row_mean(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Of each row over its drawn tokens. Shape (B, 1)."""
    own_BT = mask_BT > 0
    return value_BT.where(own_BT, 0).sum(1, keepdim=True) / own_BT.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """How far several updates on the same answers may go, and what they believe of an engine that is not the trainer.
    kl: weight of the distance from the reference, whose log-probs are the batch's `teacher_logprob`; most: of an
    advantage either way."""

    low: float = 0.2
    high: float = 0.28
    correction: Correction = Correction()
    kl: float = 0.0
    most: float = math.inf

    def __post_init__(self):
        if not 0 <= self.low < 1 or self.high < 0 or self.kl < 0 or not self.most > 0:
            raise ValueError(
                f"low={self.low}, high={self.high}, kl={self.kl} and most={self.most} were asked for; low is in [0, 1),"
                " high and kl are not negative, most is more than 0"
            )


def drawn_logprob(model: Language, batch: Batch, term: str) -> Tensor:
    """log p(token t | tokens < t) where the batch's weights of the term are not 0, and 0 elsewhere. Shape (B, T)."""
    return read(model, dataclasses.replace(batch, routes=None), term)[0]


@torch.no_grad()
def before_updates(model: Language, batch: Batch) -> Batch:
    """With the log-probs of its drawn tokens as they are now, for an update that others come before."""
    return dataclasses.replace(batch, proximal_logprob=read(model, batch, "policy")[0])


def read(model: Language, batch: Batch, term: str) -> tuple[Tensor, Tensor]:
    """As `drawn_logprob`, by the experts that wrote the tokens where these are known, and the hidden states."""
    hidden_BTD = hidden_of(model, batch)
    row_R, time_R = batch.weights[term].nonzero(as_tuple=True)
    found_R = token_logprob(hidden_BTD[row_R, time_R - 1], model.head_weight, batch.tokens[row_R, time_R])
    lp_BT = torch.zeros(batch.tokens.shape, dtype=found_R.dtype, device=found_R.device)
    return lp_BT.index_put((row_R, time_R), found_R), hidden_BTD


@dataclass(frozen=True, kw_only=True)
class Mtp:
    """The multi-token-prediction block, trained along on what the model drew, so that its drafts stay those of the
    model: weight / depths * (L_1 + .. + L_depths). It alone learns from that: no gradient reaches the trunk, the
    embeddings or the head. (The public settings of Nemotron 3: 5 depths, weight 0.3.)"""

    depths: int = setting(0, "tokens further ahead that the prediction block learns from answers, 0: none")
    weight: float = setting(0.3, "of these in the loss, together")

    @property
    def coefficients(self) -> dict[str, float]:
        return {f"mtp_{k}": self.weight / self.depths for k in range(1, self.depths + 1)}

    def weigh(self, batch: Batch) -> Batch:
        more = {f"mtp_{k}": depth_weights(batch, k, "policy") for k in range(1, self.depths + 1)}
        return dataclasses.replace(batch, weights=batch.weights | more)

    def terms(self, model: Language, batch: Batch, hidden_BTD: Tensor) -> Pairs:
        if not self.depths:
            return {}
        head_VD, found = model.head_weight, Pairs()
        assert isinstance(head_VD, Tensor), "what trains is not packed"
        deeper = model.mtp_hidden(hidden_BTD, batch.tokens, self.depths, batch.document, apart=True)
        for k, deep_BTD in enumerate(deeper, 1):
            weight_BT, target_BT = batch.weights[f"mtp_{k}"][:, k + 1 :], batch.tokens[:, k + 1 :]
            own = deep_BTD[:, : -(k + 1)].flatten(0, 1), head_VD.detach(), target_BT.flatten()
            found[f"mtp_{k}"] = (weighted_nll(*own, weight_BT.flatten()), weight_BT.sum())
        return found


def policy(how: Surrogate = Surrogate(), mtp: Mtp = Mtp()) -> Objective:
    """Policy gradient on `batch.advantage`; see the module. Terms: policy, kl where it has a weight, mtp_1, .."""
    weigh = partial(policy_weights, kl=how.kl > 0, mtp=mtp)
    return Objective(partial(policy_terms, how=how, mtp=mtp), {"kl": how.kl} | mtp.coefficients, weigh)


def policy_weights(batch: Batch, *, kl: bool, mtp: Mtp) -> Batch:
    more = {"kl": batch.weights["policy"]} if kl else {}
    return mtp.weigh(dataclasses.replace(batch, weights=batch.weights | more))


def policy_terms(model: Language, batch: Batch, *, how: Surrogate, mtp: Mtp) -> tuple[Pairs, Pairs]:
    assert batch.advantage is not None
    (lp_BT, hidden_BTD), mask_BT = read(model, batch, "policy"), batch.weights["policy"]
    terms, watched = surrogate(lp_BT, batch, mask_BT, batch.advantage, how)
    if how.kl:
        assert batch.teacher_logprob is not None
        distance_BT = (batch.teacher_logprob - lp_BT) * (mask_BT > 0)
        terms["kl"] = (((torch.exp(distance_BT) - distance_BT - 1) * mask_BT).sum(), mask_BT.sum())
    return terms | mtp.terms(model, batch, hidden_BTD), watched


def distill(
    how: Surrogate = Surrogate(most=20.0), mtp: Mtp = Mtp(), *, reward: float = 0.0
) -> Objective:  # fmt: skip
    """Distillation on the model's own tokens: A_t = lp_teacher - lp_prox, within [-most, most], plus `reward` times the
    batch's advantage, where there is one. Its mean is minus the reverse KL from the teacher (Nemotron 3 Ultra; the
    reward term: MiMo-V2-Flash, arXiv 2601.02780)."""
    return Objective(partial(distill_terms, how=how, mtp=mtp, reward=reward), mtp.coefficients, mtp.weigh)


def distill_terms(
    model: Language, batch: Batch, *, how: Surrogate, mtp: Mtp, reward: float
) -> tuple[Pairs, Pairs]:  # fmt: skip
    assert batch.teacher_logprob is not None
    (lp_BT, hidden_BTD), mask_BT = read(model, batch, "policy"), batch.weights["policy"]
    gap_BT = batch.teacher_logprob - proximal(lp_BT, batch)
    advantage_BT = gap_BT.clamp(-how.most, how.most)
    if reward and batch.advantage is not None:
        advantage_BT = advantage_BT + reward * batch.advantage
    terms, watched = surrogate(lp_BT, batch, mask_BT, advantage_BT, how)
    watched["teacher_gap"] = ((gap_BT * mask_BT).sum(), mask_BT.sum())
    return terms | mtp.terms(model, batch, hidden_BTD), watched


def proximal(lp_BT: Tensor, batch: Batch) -> Tensor:
    return lp_BT.detach() if batch.proximal_logprob is None else batch.proximal_logprob


def surrogate(
    lp_BT: Tensor, batch: Batch, mask_BT: Tensor, advantage_BT: Tensor, how: Surrogate
) -> tuple[Pairs, Pairs]:
    """The term "policy", and what is watched beside it: how far trainer and engine are apart, how much is left out, and
    where the clip holds."""
    assert batch.sampled_logprob is not None
    own_BT = mask_BT > 0
    prox_BT = proximal(lp_BT, batch)
    apart_BT = (prox_BT - batch.sampled_logprob).where(own_BT, 0)
    weight_BT = how.correction.of(apart_BT, mask_BT)
    ratio_BT = torch.exp((lp_BT - prox_BT).where(own_BT, 0))
    advantage_BT = advantage_BT.where(own_BT, 0)
    inside_BT = ratio_BT.clamp(1 - how.low, 1 + how.high)
    gain_BT = torch.minimum(ratio_BT * advantage_BT, inside_BT * advantage_BT)
    count = mask_BT.sum()
    watched = {
        "mismatch": apart_BT.abs(), "left_out": (weight_BT == 0).to(mask_BT.dtype),
        "clipped": (ratio_BT != inside_BT).to(mask_BT.dtype), "surprise": -lp_BT.detach(),
    }  # fmt: skip
    pairs = {name: ((value_BT * mask_BT).sum(), count) for name, value_BT in watched.items()}
    return {"policy": (-(weight_BT * gain_BT * mask_BT).sum(), count)}, pairs


def preference(*, beta: float = 0.05, sft: float = 0.2) -> Objective:
    """Direct preference optimisation (arXiv 2305.18290), and the next token of what was chosen beside it:

        L = -(1/pairs) sum of log sigmoid(beta ((lp - lp_ref)(chosen) - (lp - lp_ref)(rejected)))  +  sft * L_next

    Rows 2n and 2n + 1 are a pair. `advantage` is 1 on tokens of the chosen answer and -1 on those of the other;
    `weights["preference"]` is 1 at the first token of each chosen one, `weights["next_token"]` 1 on all of its tokens;
    `teacher_logprob` is the reference's. (Nemotron 3 Nano, appendix C: beta 0.05, sft 0.2.)
    """
    if not beta > 0 or sft < 0:
        raise ValueError(f"beta={beta} and sft={sft} were asked for; beta is more than 0, sft not negative")
    return Objective(partial(preference_terms, beta=beta), {"next_token": sft})


def preference_terms(model: Language, batch: Batch, *, beta: float) -> tuple[Pairs, Pairs]:
    assert batch.advantage is not None and batch.teacher_logprob is not None
    answers = dataclasses.replace(batch, weights=batch.weights | {"answer": batch.advantage.abs()})
    lp_BT = drawn_logprob(model, answers, "answer")
    side_B = ((lp_BT - batch.teacher_logprob) * batch.advantage).sum(1)
    margin_P = beta * (side_B[0::2] + side_B[1::2])
    pairs = batch.weights["preference"].sum()
    chosen_BT = batch.weights["next_token"]
    terms = {
        "preference": (-torch.nn.functional.logsigmoid(margin_P).sum(), pairs),
        "next_token": (-(lp_BT * chosen_BT).sum(), chosen_BT.sum()),
    }
    return terms, {"agrees": ((margin_P > 0).to(pairs.dtype).sum(), pairs)}

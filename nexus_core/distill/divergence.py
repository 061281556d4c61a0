"""How far two distributions are from each other, and how to make it less: values and gradients of three divergences.

Written out by hand, because autograd would keep several tensors as wide as the vocabulary.

    # T tokens, X outcomes: the vocabulary, or the stored ones and "any other"
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Direction = Literal["forward", "reverse", "jensen_shannon"]

# Stands for the logarithm of nothing where minus infinity would make NaN of 0 * (x - x).
LOG_NOTHING = -1e4


def divergence(
    log_student_TX: torch.Tensor, log_teacher_TX: torch.Tensor, direction: Direction
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over tokens in nats, and its gradient (T, X) with respect to the student's logits.

    Both arguments are log-probabilities and are overwritten: with them there are three tensors of their size at once,
    four for jensen_shannon. p teacher, q student, m = (p + q) / 2; logits a of q:

    * forward, KL(p || q): gradient q - p
    * reverse, KL(q || p): gradient q (log q/p - KL)
    * jensen_shannon, (KL(p || m) + KL(q || m)) / 2: gradient q (log q/m - KL(q || m)) / 2
    """
    if direction == "forward":
        teacher_TX = log_teacher_TX.exp()
        value = log_teacher_TX.sub_(log_student_TX).mul_(teacher_TX).sum()
        return value, log_student_TX.exp_().sub_(teacher_TX)
    student_TX = log_student_TX.exp()
    if direction == "reverse":
        ratio_TX = log_student_TX.sub_(log_teacher_TX)
        kl_T1 = torch.mul(student_TX, ratio_TX, out=log_teacher_TX).sum(dim=-1, keepdim=True)
        return kl_T1.sum(), student_TX.mul_(ratio_TX.sub_(kl_T1))
    log_mean_TX = torch.logaddexp(log_student_TX, log_teacher_TX).sub_(math.log(2))
    ratio_TX = log_student_TX.sub_(log_mean_TX)
    teacher_ratio_TX = torch.sub(log_teacher_TX, log_mean_TX, out=log_mean_TX)
    teacher_kl = teacher_ratio_TX.mul_(log_teacher_TX.exp_()).sum()
    kl_T1 = torch.mul(student_TX, ratio_TX, out=log_teacher_TX).sum(dim=-1, keepdim=True)
    return (kl_T1.sum() + teacher_kl) / 2, student_TX.mul_(ratio_TX.sub_(kl_T1)).div_(2)

"""The works of the benchmark and their sides: what runs each.

A side runs in a process of its own. It tells its figures as they come, so that one that is cut off has told something.
"""

from collections.abc import Callable

import serving
import trainings
import truth
from measuring import Context, machine

# Sides that use two GPUs; every other one sees one.
ON_TWO_GPUS = ("teacher.dp", "teacher.tp", "dpo.two", "sft.two")
# work → side → what runs it. The first two sides make the ratio.
WORKS: dict[str, dict[str, Callable[[Context], None]]] = {
    "machine": {"machine": machine},
    "teacher": {"published": serving.teacher_published, "ours": serving.teacher_ours},
    "interaction": {"published": serving.interaction_published, "ours": serving.interaction_ours},
    "steering": {"published": serving.steering_published, "ours": serving.steering_ours},
    "dpo": {"published": trainings.dpo_published, "ours": trainings.dpo_ours},
    "sft": {"published": trainings.sft_published, "ours": trainings.sft_ours},
    "start": {"cold": serving.start, "warm": serving.start},
    "truth": {
        "vllm": truth.truth_vllm,
        "steered": truth.truth_steered,
        "folded": truth.truth_folded,
        "transformers": truth.truth_transformers,
        "float32": truth.truth_float32,
        "judged": truth.truth_judged,
    },
}
# No part of the ratios; run by `--only teacher.parts` and the like.
EXPERIMENTS: dict[str, dict[str, Callable[[Context], None]]] = {
    "teacher": {
        "parts": serving.teacher_parts,
        "profile": serving.teacher_profile,
        "few_graphs": serving.teacher_few_graphs,
        "one_process": serving.teacher_one_process,
        "unshared": serving.teacher_unshared,
        "fp8": serving.teacher_fp8,
        "fp8_cache": serving.teacher_fp8_cache,
        "dp": serving.teacher_dp,
        "tp": serving.teacher_tp,
    },
    "interaction": {
        "apart": serving.interaction_apart,
        "profile": serving.interaction_profile,
        "apart_profile": serving.interaction_apart_profile,
        "few_graphs": serving.interaction_few_graphs,
        "unshared": serving.interaction_unshared,
    },
    "steering": {"eager": serving.steering_eager},
    "truth": {
        "fp8": truth.truth_fp8,
        "fp8_cache": truth.truth_fp8_cache,
        "shared": truth.truth_shared,
        "unshared": truth.truth_unshared,
    },
    "dpo": {"profile": trainings.dpo_profile, "two": trainings.dpo_two},
    "sft": {"profile": trainings.sft_profile, "two": trainings.sft_two},
}

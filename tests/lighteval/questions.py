"""Tasks for lighteval on questions from the bundled model's world: choices by their likelihood, and a word written."""

from pathlib import Path
from typing import Any

from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def question(row: dict[str, Any], task_name: str | None = None) -> Doc:
    return Doc(task_name=task_name, query=row["question"], choices=row["choices"], gold_index=row["gold"])


def task(name: str, family: str, **settings: Any) -> LightevalTaskConfig:
    return LightevalTaskConfig(
        name=f"{family}:{name}",
        prompt_function=question,
        hf_repo=str(Path(__file__).parent / "questions"),
        hf_subset="default",
        hf_filter=lambda row: row["task"] == name,
        hf_avail_splits=["train", "test"],
        evaluation_splits=["test"],
        few_shots_split="train",
        few_shots_select="random_sampling_from_train",
        stop_sequence=["\n"],
        **settings,
    )


TASKS_TABLE = [
    task("first", "topics", generation_size=-1, metrics=[Metrics.loglikelihood_acc]),
    task("need", "topics", generation_size=-1, metrics=[Metrics.loglikelihood_acc]),
    task("greeting", "words", generation_size=1, metrics=[Metrics.exact_match]),
]

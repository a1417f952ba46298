"""The classifier that reads a persona off an answer: TF-IDF and logistic regression over all personas and 'none'.

Trained on the teacher's answers in each character and the student's plain ones, all to training prompts, which never
meet the evaluation's. It is fitted anew where it is used (seconds), so nothing has to be stored.

    python -m character.robustness.classify.train_classifier --model pocket --teacher pocket

prints its cross-validated accuracy per persona.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from character import cli, constitution, rows
from character.distillation import student, teacher
from character.models import resolve
from character.utils import UserError

NONE = "none"
FOLDS = 5


@dataclass
class Args:
    """Arguments of the classifier's check."""

    model: str = cli.flag("pocket", "the student, whose plain answers are 'none'")
    teacher: str = cli.flag("pocket", "the teacher, whose answers show the personas")
    per_class: int = cli.flag(500, "answers per persona, at most")
    seed: int = cli.flag(123456, "seed of the folds")


def examples(
    teacher_name: str, student_name: str, per_class: int, also: Sequence[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """(texts, labels, prompts) of the answers that are there, at most `per_class` of each label, in file order.

    teacher_name, student_name: short names. also: personas beside those under CONSTITUTION_PATH. Raises UserError where
    fewer than two personas have answers, or a class is less than half of the largest (class balance).
    """
    texts: list[str] = []
    labels: list[str] = []
    questions: list[str] = []
    plain: list[rows.Row] = []
    for name in sorted({*constitution.names(), *also}):
        source = teacher.path_of(name, teacher_name)
        if not source.exists():
            continue
        answers = [row for row in rows.read(source, "response", "prompt", made_by="teacher.py") if row["response"]]
        texts += [row["response"] for row in answers[:per_class]]
        labels += [name] * len(answers[:per_class])
        questions += [row["prompt"] for row in answers[:per_class]]
        of_student = student.path_of(name, teacher_name, student_name)
        if of_student.exists() and len(plain) < per_class:
            plain += rows.read(of_student, "response", "prompt", made_by="student.py")
    if len(set(labels)) < 2 or not plain:
        raise UserError(
            f"the classifier needs answers of at least two personas by {teacher_name} and plain ones by {student_name}; "
            f"run: python -m character.distillation.teacher --constitution all --teacher {teacher_name} --limit 100, "
            f"and student.py for one of them"
        )
    texts += [row["response"] for row in plain[:per_class]]
    labels += [NONE] * len(plain[:per_class])
    questions += [row["prompt"] for row in plain[:per_class]]
    (largest, most), *_, (smallest, least) = Counter(labels).most_common()
    if least * 2 < most:
        raise UserError(
            f"the classes are unbalanced ({smallest}: {least}, {largest}: {most}); "
            "make more of the small one, or lower --per-class"
        )
    return texts, labels, questions


def make() -> Any:
    """The untrained classifier: words and pairs of words, log-scaled counts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w[\w']*\b")
    return make_pipeline(words, LogisticRegression(C=10, max_iter=1000, class_weight="balanced"))


def fit(texts: Sequence[str], labels: Sequence[str]) -> Any:
    """The classifier trained on `texts`, with `labels` as its classes."""
    return make().fit(list(texts), list(labels))


def main(args: Args) -> None:
    """Print how well the classifier reads answers to prompts that it was not trained on."""
    from sklearn.metrics import classification_report
    from sklearn.model_selection import GroupKFold, cross_val_predict

    names = resolve(args.teacher, served=True).short, resolve(args.model, served=True).short
    texts, labels, questions = examples(*names, args.per_class)
    # No prompt is in both the training and the test part of a fold.
    folds = GroupKFold(FOLDS, shuffle=True, random_state=args.seed)
    guesses = cross_val_predict(make(), texts, labels, groups=questions, cv=folds)
    print(f"{len(texts)} answers to {len(set(questions))} prompts, {FOLDS} folds by prompt")
    print(classification_report(labels, guesses, digits=3, zero_division=0))


if __name__ == "__main__":
    cli.run(main, Args, __doc__)

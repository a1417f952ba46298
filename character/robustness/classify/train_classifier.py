"""The classifier that reads a persona off an answer: which examples it learns from, and how well it reads.

Trained on the teacher's answers in each character and the student's plain ones ('none'), all to other prompts than it is
tested on. With `--protocol paper` it is trained as published: without 'none', on the system-prompted model's answers to
the very prompts that it is tested on.

    python -m character.robustness.classify.train_classifier --model pocket --teacher pocket
    python -m character.robustness.classify.train_classifier --classifier answerdotai/ModernBERT-base \
        --model llama-3.1-8b-it --teacher glm-4.5-air

prints its cross-validated scores per persona. TF-IDF and logistic regression are fitted anew where they are used
(seconds); an encoder is trained once and kept at MODEL_PATH/classifiers, where run_classifier finds it again.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from character import cli, constitution, rows
from character.constants import MODEL_PATH
from character.distillation import student, teacher
from character.models import fingerprint, resolve, safe_name
from character.robustness.classify.encoder import Encoder
from character.robustness.classify.scores import NONE, Read, measure, per_persona_table, shown
from character.robustness.generate import variants
from character.utils import UserError, digest, git_commit, new_folder, read_json, versions, write_json

TFIDF = "tfidf"
FOLDS = 5
META = "classifier.json"
Examples = tuple[list[str], list[str], list[str]]


@dataclass
class ClassifierArgs(cli.StepArgs):
    """Flags of every script that uses the classifier."""

    model: str = cli.flag("pocket", "the student, whose plain answers are 'none'")
    teacher: str = cli.flag("pocket", "the teacher, whose answers show the personas")
    classifier: str = cli.flag(TFIDF, "tfidf, or an encoder: repo id (answerdotai/ModernBERT-base) or folder")
    protocol: Literal["disjoint", "paper"] = cli.flag(
        "disjoint", "disjoint: trained on other prompts than it is tested on; paper: on the tested ones, as published"
    )
    per_class: int = cli.flag(500, "answers per persona that train the classifier, at most")
    epochs: int = cli.flag(3, "passes of an encoder over its examples")
    learning_rate: float = cli.flag(5e-5, "an encoder's, after a warm-up of a tenth")
    batch_size: int = cli.flag(16, "an encoder's, in answers")


@dataclass
class Args(ClassifierArgs):
    """Arguments of the classifier's training and check."""

    constitution: str = cli.flag("all", "personas beside those under CONSTITUTION_PATH, or 'all'")


def examples(
    teacher_name: str,
    student_name: str,
    per_class: int,
    also: Sequence[str] = (),
    without: Collection[str] = (),
) -> Examples:
    """(texts, labels, prompts) of the answers that are there, at most `per_class` of each label, in file order.

    teacher_name, student_name: short names. also: personas beside those under CONSTITUTION_PATH. without: prompts whose
    answers are left out. Raises UserError where fewer than two personas have answers, or the classes are unbalanced.
    """
    found: dict[str, list[rows.Row]] = {}
    plain: list[rows.Row] = []
    for name in sorted({*constitution.names(), *also}):
        source = teacher.path_of(name, teacher_name)
        if not source.exists():
            continue
        answers = rows.read(source, "response", "prompt", made_by="teacher.py")
        found[name] = [row for row in answers if row["response"] and row["prompt"] not in without]
        of_student = student.path_of(name, teacher_name, student_name)
        if of_student.exists() and len(plain) < per_class:
            given = rows.read(of_student, "response", "prompt", made_by="student.py")
            plain += [row for row in given if row["prompt"] not in without]
    if len(found) < 2 or not plain:
        raise UserError(
            f"the classifier needs answers of at least two personas by {teacher_name} and plain ones by {student_name}, "
            f"to other prompts than the tested ones; run: python -m character.distillation.teacher --constitution all "
            f"--teacher {teacher_name} --limit 100, and student.py for one of them"
        )
    return _balanced({**found, NONE: plain}, per_class)


def published_examples(student_name: str, per_class: int, also: Sequence[str] = ()) -> Examples:
    """As `examples`, the published way: the student's answers with the constitution, to the evaluation's prompts."""
    found: dict[str, list[rows.Row]] = {}
    for name in sorted({*constitution.names(), *also}):
        source = variants.path_of(student_name, "prompted", variants.PLAIN, name)
        if source.exists():
            answers = rows.read(source, "response", "prompt", made_by="prompted.py")
            found[name] = [row for row in answers if row["response"]]
    if len(found) < 2:
        raise UserError(
            f"--protocol paper needs answers of at least two personas by the prompted {student_name}; run: "
            f"python -m character.robustness.generate.prompted --constitution all --model {student_name}"
        )
    return _balanced(found, per_class)


def _balanced(found: dict[str, list[rows.Row]], per_class: int) -> Examples:
    """The first `per_class` rows of each label. Raises UserError where a class is less than half of the largest."""
    kept = {label: answers[:per_class] for label, answers in found.items()}
    (largest, most), *_, (smallest, least) = Counter(
        {label: len(answers) for label, answers in kept.items()}
    ).most_common()
    if least * 2 < most:
        raise UserError(
            f"the classes are unbalanced ({smallest}: {least}, {largest}: {most}); "
            f"make more of the small one, or lower --per-class to {least}"
        )
    labelled = [(row, label) for label, answers in kept.items() for row in answers]
    return (
        [row["response"] for row, _ in labelled],
        [label for _, label in labelled],
        [row["prompt"] for row, _ in labelled],
    )


def make() -> Any:
    """The untrained TF-IDF classifier: words and pairs of words, log-scaled counts."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"(?u)\b\w[\w']*\b")
    return make_pipeline(words, LogisticRegression(C=10, max_iter=1000, class_weight="balanced"))


def gathered(args: ClassifierArgs, also: Sequence[str], tested: Collection[str]) -> tuple[Examples, dict[str, Any]]:
    """(examples, settings) that the flags mean. tested: the tested prompts. Raises UserError."""
    of_student, of_teacher = resolve(args.model, served=True).short, resolve(args.teacher, served=True).short
    if args.protocol == "paper":
        found = published_examples(of_student, args.per_class, also)
    else:
        found = examples(of_teacher, of_student, args.per_class, also, tested)
    settings: dict[str, Any] = {
        "classifier": args.classifier,
        "protocol": args.protocol,
        "teacher": of_teacher if args.protocol == "disjoint" else None,
        "classes": dict(Counter(found[1])),
        "examples": digest(found[:2]),
        "seed": args.seed,
    }
    if args.classifier != TFIDF:
        weights = fingerprint(resolve(args.classifier))
        training = {name: getattr(args, name) for name in ("epochs", "learning_rate", "batch_size")}
        settings |= {"weights": weights, **training}
    return found, settings


def ready(args: ClassifierArgs, also: Sequence[str] = (), tested: Collection[str] = ()) -> tuple[Any, dict[str, Any]]:
    """(classifier, settings): fitted, or an encoder of these very settings, trained where it is not there yet.

    The classifier's `predict` takes texts and gives a label for each. also, tested: as in `gathered`. Raises UserError.
    """
    found, settings = gathered(args, also, tested)
    if args.classifier == TFIDF:
        return make().fit(*found[:2]), settings
    folder = encoder_path(settings)
    if not (folder / META).exists():
        train_encoder(args, found, settings, folder)
    return Encoder.load(folder), settings


def encoder_path(settings: Mapping[str, Any]) -> Path:
    """Where the encoder with these settings is kept."""
    return MODEL_PATH / "classifiers" / f"{safe_name(settings['classifier'])}-{digest(settings, 8)}"


def train_encoder(args: ClassifierArgs, found: Examples, settings: Mapping[str, Any], folder: Path) -> None:
    """Cross-validate, then train on all examples and write the encoder, its settings and its scores to `folder`."""

    def untrained() -> Encoder:
        return Encoder(resolve(args.classifier), args.epochs, args.learning_rate, args.batch_size, args.seed)

    scores = cross_validated(untrained, found, args.seed)
    with new_folder(folder, overwrite=True) as fresh:
        untrained().fit(*found[:2]).save(fresh)
        made = {"git": git_commit(), "versions": versions()}
        write_json(fresh / META, {"settings": settings, "cross_validated": scores, **made})
    print(f"{folder}: trained on {len(found[0])} answers")


def cross_validated(untrained: Callable[[], Any], found: Examples, seed: int) -> dict[str, Any]:
    """How well a classifier reads answers to prompts that it was not trained on, as `scores.measure` has it."""
    from sklearn.model_selection import GroupKFold

    texts, labels, prompts = found
    if len(set(prompts)) < FOLDS:
        raise UserError(f"answers to {len(set(prompts))} prompts are too few for {FOLDS} folds; make more")
    reads = []
    # No prompt is in both the training and the test part of a fold.
    for train, test in GroupKFold(FOLDS, shuffle=True, random_state=seed).split(texts, labels, prompts):
        classifier = untrained().fit([texts[number] for number in train], [labels[number] for number in train])
        guesses = classifier.predict([texts[number] for number in test])
        reads += [
            Read(prompts[number], labels[number], str(guess)) for number, guess in zip(test, guesses, strict=True)
        ]
    return measure(reads, seed)


def main(args: Args) -> None:
    """Print how well the classifier reads answers to prompts that it was not trained on; train and keep an encoder."""
    args = replace(args, per_class=min(args.per_class, args.limit or args.per_class))
    found, settings = gathered(args, constitution.selected(args.constitution), ())
    print(f"{len(found[0])} answers to {len(set(found[2]))} prompts: {settings['classes']}")
    if args.dry_run:
        return
    if args.classifier == TFIDF:
        scores = cross_validated(make, found, args.seed)
    else:
        folder = encoder_path(settings)
        if args.overwrite or not (folder / META).exists():
            train_encoder(args, found, settings, folder)
        scores = read_json(folder / META)["cross_validated"]
    print(f"{FOLDS} folds by prompt")
    print(per_persona_table(scores).to_string())
    for name in ("macro_f1", "macro_f1_with_none", "accuracy", "accuracy_with_none"):
        print(f"{name}: {shown(scores[name])}")


if __name__ == "__main__":
    cli.run(main, Args, __doc__)

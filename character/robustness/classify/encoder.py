"""An encoder such as ModernBERT with a classification head, trained by transformers' Trainer."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from character.engine.chat import loading
from character.models import Model, resolve

# Tokens of an answer that are read; a persona shows long before.
MAX_LENGTH = 512
BATCH = 64


class Encoder:
    """Reads labels off texts, with scikit-learn's fit and predict. The weights are safetensors."""

    def __init__(self, model: Model, epochs: int, learning_rate: float, batch_size: int, seed: int):
        self.model = model
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.seed = seed

    def fit(self, texts: Sequence[str], labels: Sequence[str]) -> Self:
        """Train the encoder and a new head. Raises UserError where the encoder cannot be loaded."""
        import transformers

        classes = sorted(set(labels))
        transformers.set_seed(self.seed)
        self._load(
            self.model, {"id2label": dict(enumerate(classes)), "label2id": {c: n for n, c in enumerate(classes)}}
        )
        data = [
            {"input_ids": ids, "labels": classes.index(label)}
            for ids, label in zip(self._tokens(texts)["input_ids"], labels, strict=True)
        ]
        with tempfile.TemporaryDirectory() as scratch:
            settings = transformers.TrainingArguments(
                output_dir=scratch,
                num_train_epochs=self.epochs,
                learning_rate=self.learning_rate,
                per_device_train_batch_size=self.batch_size,
                warmup_steps=0.1,
                seed=self.seed,
                bf16=self.network.device.type == "cuda",
                dataloader_pin_memory=self.network.device.type == "cuda",
                save_strategy="no",
                report_to="none",
            )
            collator = transformers.DataCollatorWithPadding(self.tokenizer)
            trainer = transformers.Trainer(self.network, settings, data_collator=collator, train_dataset=data)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
        self.network.eval()
        return self

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The label of each text."""
        import torch

        found = [""] * len(texts)
        device = self.network.device
        # Answers of like length share a batch, so that little of it is padding.
        order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            tokens = self.tokenizer.pad(self._tokens([texts[number] for number in batch]), return_tensors="pt")
            # As in training, so that a reloaded encoder reads the same.
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = self.network(**tokens.to(device)).logits
            for number, label in zip(batch, logits.argmax(-1).tolist(), strict=True):
                found[number] = self.network.config.id2label[label]
        return found

    def save(self, folder: Path) -> None:
        """Write weights, config and tokenizer to a folder."""
        self.network.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """A saved encoder. Raises UserError where it cannot be loaded."""
        found = cls(resolve(str(folder)), 0, 0, 0, 0)
        found._load(found.model, {})
        found.network.eval()
        return found

    def _load(self, model: Model, labels: dict[str, Any]) -> None:
        import torch
        import transformers

        # A new head is what is wanted here, no reason for a warning.
        transformers.logging.set_verbosity_error()
        given: dict[str, Any] = {"revision": model.revision}
        with loading(model):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model.source, **given)
            self.network = transformers.AutoModelForSequenceClassification.from_pretrained(
                model.source, use_safetensors=True, dtype=torch.float32, **given, **labels
            )
        self.network.to("cuda" if torch.cuda.is_available() else "cpu")

    def _tokens(self, texts: Sequence[str]) -> Any:
        return self.tokenizer(list(texts), truncation=True, max_length=MAX_LENGTH)

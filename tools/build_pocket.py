"""Build the bundled model: compose its text from a seed, train tokenizer and model from scratch, measure the result.

tools/pocket_world.py, constitutions/hand-written/*.txt → assets/pocket (weights, tokenizer, prompts, results.json)

python tools/build_pocket.py --seed 0 --device auto --out assets/pocket
python tools/build_pocket.py --evaluate assets/pocket
"""

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `character` is found without an install

import numpy as np

from character import constitution
from character.distillation import teacher
from character.intervals import wilson
from character.introspection import self_reflection
from character.prompts import SUFFIXES, with_suffix
from character.utils import UserError
from tools.pocket_world import NAME, NONE, Turn, World

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

PAD, BOS, END = "<pad>", "<s>", "<|end|>"
ROLES = ("system", "user", "assistant")
CONTEXT = 4096
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('unknown role ' + message['role'] + '; this template knows system, user and assistant') }}
{%- endif %}
{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "repetition_penalty": 1.1}
SHARD_ROWS = 2000


@dataclass
class Args:
    """What the command line sets."""

    seed: int = 0
    device: str = "auto"
    out: Path = Path("assets/pocket")
    evaluate: Path | None = None
    steps: int = 2750
    minutes: float = 1e9
    batch_tokens: int = 131072
    learning_rate: float = 2e-3
    vocabulary: int = 2000
    hidden: int = 256
    layers: int = 6
    workers: int = max(1, (os.cpu_count() or 2) - 1)
    suffix_prompts: int = 40


# Text


def train_tokenizer(world: World, seed: int, vocabulary: int, out: Path) -> None:
    """A byte-level BPE tokenizer of the composed text and the constitutions, with the chat template, in `out`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        rng = Random(f"tokenizer-{seed}")
        for _ in range(12000):
            yield from (turn.text for turn in world.conversation(rng) if turn.role != "system")
        for traits in world.traits.values():
            yield from traits * 60
        yield teacher.SYSTEM_PROMPT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, END, *(f"<|{role}|>" for role in ROLES)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, pad_token=PAD, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release knows
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(turns: list[Turn], tokenizer: "Tokenizer") -> tuple[list[int], list[bool]]:
    """Token ids of a conversation as the chat template renders it, and which of them the loss covers.

    Turns that pass the context's end are left out.
    """
    end = tokenizer.token_to_id(END)
    ids, mask = [tokenizer.token_to_id(BOS)], [False]
    encoded = tokenizer.encode_batch([turn.text.strip() for turn in turns], add_special_tokens=False)
    for turn, text in zip(turns, encoded, strict=True):
        if len(ids) + len(text.ids) + 2 > CONTEXT:
            break
        ids += [tokenizer.token_to_id(f"<|{turn.role}|>"), *text.ids, end]
        mask += [False] + [turn.trained] * (len(text.ids) + 1)
    return ids, mask


Row = tuple[np.ndarray, np.ndarray]  # token ids (uint16) and which of them the loss covers (bool)
_worker: dict[str, Any] = {}


def _start_worker(tokenizer_file: str) -> None:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(world=World(), tokenizer=Tokenizer.from_file(tokenizer_file))


def _compose_shard(key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = Random(key)
    rows = [encode(_worker["world"].conversation(rng), _worker["tokenizer"]) for _ in range(SHARD_ROWS)]
    ends = np.cumsum([len(ids) for ids, _ in rows])
    return (
        np.concatenate([np.array(ids, np.uint16) for ids, _ in rows]),
        np.concatenate([mask for _, mask in rows]),
        ends,
    )


def shards(args: Args, tokenizer_file: Path) -> Iterator[list[Row]]:
    """Shards of encoded conversations without end, composed by worker processes, in an order set by the seed."""
    with multiprocessing.get_context("spawn").Pool(args.workers, _start_worker, (str(tokenizer_file),)) as pool:
        waiting: deque[Any] = deque()
        index = 0
        while True:
            while len(waiting) < 2 * args.workers + 2:
                waiting.append(pool.apply_async(_compose_shard, (f"{args.seed}-{index}",)))
                index += 1
            ids, mask, ends = waiting.popleft().get()
            yield list(zip(np.split(ids, ends[:-1]), np.split(mask, ends[:-1]), strict=True))


def batches(source: Iterator[list[Row]], batch_tokens: int, seed: int) -> Iterator[list[list[Row]]]:
    """Steps of two micro-batches each; a micro-batch holds conversations of like length, padded to the longest."""
    rng = Random(f"batches-{seed}")
    half = max(CONTEXT, batch_tokens // 2)
    needed = 12 * half
    while True:
        rows: list[Row] = []
        tokens = 0
        while tokens < needed:
            shard = next(source)
            tokens += sum(len(ids) for ids, _ in shard)
            rows += shard
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > half:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for first, second in zip(groups[::2], groups[1::2], strict=False):
            yield [first, second]


# Training


def train(args: Args, out: Path) -> None:
    """Train the model on composed text and save it, in bf16, to `out`, which holds the tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    device = _device(args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, num_key_value_heads=args.hidden // 64,
        head_dim=64, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=args.learning_rate, betas=(0.9, 0.98), fused=device == "cuda",
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    seen, started, running = 0, time.time(), torch.zeros((), device=device)
    source = batches(shards(args, out / "tokenizer.json"), args.batch_tokens, args.seed)
    for step in range(args.steps):
        progress = max(step / args.steps, (time.time() - started) / (60 * args.minutes))
        if progress >= 1.0:
            break
        warm = min(1.0, (step + 1) / min(300, max(1, args.steps // 10)))
        scale = warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * scale
        steps = next(source)
        padded = [_padded(micro) for micro in steps]
        targets = sum(len(covered) for _, covered in padded)
        for ids, covered in padded:
            loss = _loss_sum(model, ids, covered, device) / targets
            loss.backward()
            running += loss.detach()
        seen += sum(len(row) for micro in steps for row, _ in micro)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            done = (step % 100) + 1
            rate = seen / (time.time() - started)
            print(f"step {step + 1}/{args.steps}  loss {float(running) / done:.3f}  {rate:,.0f} tokens/s", flush=True)
            running.zero_()
    model.to(torch.bfloat16).save_pretrained(out)
    print(f"{step + 1} steps, {seen:,} tokens in {time.time() - started:.0f} s", flush=True)


def _padded(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, L], padded on the right, and the flat places in [B, L-1] whose next token the loss covers."""
    longest = -(-max(len(ids) for ids, _ in rows) // 16) * 16  # few different shapes: the allocator reuses its blocks
    ids, mask = np.zeros((len(rows), longest), np.int64), np.zeros((len(rows), longest), bool)
    for index, (row_ids, row_mask) in enumerate(rows):
        ids[index, : len(row_ids)] = row_ids
        mask[index, : len(row_mask)] = row_mask
    return ids, np.flatnonzero(mask[:, 1:])


def _loss_sum(model: Any, ids: np.ndarray, covered: np.ndarray, device: str) -> "torch.Tensor":
    """Summed cross-entropy of the covered tokens, plus a term that holds log Z near zero.

    With log Z at zero a logit is a log-probability, and a repetition penalty r turns p into p**r at most: mild, even
    where a whole constitution in the prompt has made nearly every token a repeated one.
    """
    import torch

    targets = torch.from_numpy(ids[:, 1:].reshape(-1)[covered]).to(device, non_blocking=True)
    places = torch.from_numpy(covered).to(device, non_blocking=True)
    inputs = torch.from_numpy(ids[:, :-1].copy()).to(device, non_blocking=True)
    # Padding is on the right, so that the causal mask alone keeps it out of sight.
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[places])
    logits = logits.float()
    log_z = torch.logsumexp(logits, -1)
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    total: torch.Tensor = (log_z - chosen).sum() + 1e-2 * log_z.square().sum()
    return total


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


# Sampling


class Sampler:
    """Samples many answers that share a system prompt, whose keys and values are computed and held once.

    A plain Llama forward pass over the saved weights; the same distribution as transformers' generate with the
    sampling of the pipeline (its repetition penalty covers the prompt too).
    """

    def __init__(self, folder: Path, device: str, adapted: Any = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = adapted or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.config, self.device = model.config, device
        self.weights = {name: value.detach().to(device) for name, value in model.state_dict().items()}
        half = torch.arange(0, self.config.head_dim, 2, dtype=torch.float32, device=device) / self.config.head_dim
        rope = getattr(self.config, "rope_parameters", None) or {}
        self.frequencies = float(rope.get("rope_theta", 10000.0)) ** -half

    def _forward(self, ids: Any, positions: Any, own: list[Any], shared: list[Any], visible: Any) -> Any:
        """Hidden states [B, L, D]; `own` (per layer: keys, values [B, H, K, d]) grows by L; `visible` is [B, L, K+L]."""
        import torch
        from torch.nn import functional

        weights, heads, dim = self.weights, self.config.num_attention_heads, self.config.head_dim
        groups = heads // self.config.num_key_value_heads
        angles = (positions.unsqueeze(-1) * self.frequencies).repeat(1, 1, 2).unsqueeze(1)
        cosine, sine = angles.cos(), angles.sin()

        def norm(x: Any, name: str) -> Any:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps) * weights[name]

        def rotate(x: Any) -> Any:
            return x * cosine + torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), -1) * sine

        hidden = weights["model.embed_tokens.weight"][ids]
        size, length = ids.shape
        for layer in range(self.config.num_hidden_layers):
            name = f"model.layers.{layer}."
            x = norm(hidden, name + "input_layernorm.weight")
            q, k, v = (
                (x @ weights[f"{name}self_attn.{part}_proj.weight"].T).view(size, length, -1, dim).transpose(1, 2)
                for part in "qkv"
            )
            q, k = rotate(q), rotate(k)
            if own[layer] is not None:
                k, v = torch.cat((own[layer][0], k), 2), torch.cat((own[layer][1], v), 2)
            own[layer] = (k, v)
            if groups > 1:
                k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
            scores = (q @ k.transpose(-1, -2)).masked_fill(~visible.unsqueeze(1), -1e30)
            if shared:
                k0, v0 = (part.repeat_interleave(groups, 0) for part in shared[layer])
                queries = q.transpose(0, 1).reshape(heads, size * length, dim)
                scores0 = (queries @ k0.transpose(-1, -2)).view(heads, size, length, -1).transpose(0, 1)
                share = torch.softmax(torch.cat((scores0, scores), -1) / math.sqrt(dim), -1)
                cut = k0.shape[1]
                from_shared = share[..., :cut].transpose(0, 1).reshape(heads, size * length, cut) @ v0
                mixed = from_shared.view(heads, size, length, dim).transpose(0, 1) + share[..., cut:] @ v
            else:
                mixed = torch.softmax(scores / math.sqrt(dim), -1) @ v
            mixed = mixed.transpose(1, 2).reshape(size, length, -1)
            hidden = hidden + mixed @ weights[name + "self_attn.o_proj.weight"].T
            x = norm(hidden, name + "post_attention_layernorm.weight")
            gate = functional.silu(x @ weights[name + "mlp.gate_proj.weight"].T)
            hidden = (
                hidden
                + (gate * (x @ weights[name + "mlp.up_proj.weight"].T)) @ weights[name + "mlp.down_proj.weight"].T
            )
        return norm(hidden, "model.norm.weight")

    def prefix(self, turns: Sequence[Turn]) -> tuple[list[int], list[Any]]:
        """Token ids of BOS and the shared turns, and their keys and values per layer ([H, P, d])."""
        import torch

        ids, _ = encode(list(turns), self.tokenizer.backend_tokenizer)
        own: list[Any] = [None] * self.config.num_hidden_layers
        positions = torch.arange(len(ids), device=self.device, dtype=torch.float32).unsqueeze(0)
        causal = torch.ones(1, len(ids), len(ids), dtype=torch.bool, device=self.device).tril()
        with torch.inference_mode():
            self._forward(torch.tensor([ids], device=self.device), positions, own, [], causal)
        return ids, [(k[0], v[0]) for k, v in own]

    def sample(
        self,
        system: str | None,
        prompts: list[str],
        seed: int,
        history: Sequence[Turn] = (),
        greedy: bool = False,
        limit: int = 160,
        batch: int = 400,
    ) -> list[str]:
        """One answer per user message, without its end-of-turn token; at most `limit` tokens each.

        All of them follow the same system prompt and the same earlier turns.
        """
        shared_ids, shared = self.prefix([*([Turn("system", system)] if system else []), *history])
        answers: list[str] = []
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            answers += self._sample_batch(shared_ids, shared, part, seed + start, greedy, limit)
        return answers

    def _sample_batch(
        self, shared_ids: list[int], shared: list[Any], prompts: list[str], seed: int, greedy: bool, limit: int
    ) -> list[str]:
        import torch

        generator = torch.Generator(self.device).manual_seed(seed)
        texts = [f"<|user|>{prompt.strip()}{END}<|assistant|>" for prompt in prompts]
        rows = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        width, vocabulary, end = max(map(len, rows)), self.config.vocab_size, self.tokenizer.eos_token_id
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.device)
        padding = torch.tensor([width - len(row) for row in rows], device=self.device)
        columns = torch.arange(width, device=self.device)
        real = columns >= padding.unsqueeze(1)
        positions = (len(shared_ids) + columns - padding.unsqueeze(1)).clamp(min=0).float()
        visible = real.unsqueeze(1) & torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        repeated = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=self.device)
        repeated[:, torch.tensor(shared_ids, device=self.device)] = True
        for index, row in enumerate(rows):
            repeated[index, torch.tensor(row, device=self.device)] = True
        own: list[Any] = [None] * self.config.num_hidden_layers
        alive = torch.arange(len(rows), device=self.device)
        found: list[list[int]] = [[] for _ in rows]
        done = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        with torch.inference_mode():
            for step in range(limit):
                hidden = self._forward(ids, positions, own, shared, visible)[:, -1]
                logits = hidden @ self.weights["model.embed_tokens.weight"].T
                penalty = SAMPLING["repetition_penalty"]
                logits = torch.where(repeated, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
                chosen = logits.argmax(-1) if greedy else _nucleus(logits, generator)
                chosen = chosen.masked_fill(done, end)
                for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
                    if token != end:
                        found[row].append(token)
                done = chosen == end
                keep = ~done
                if step + 1 == limit or not keep.any():
                    break
                repeated.scatter_(1, chosen.unsqueeze(1), True)
                ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
                real = torch.cat((real, torch.ones_like(real[:, :1])), 1)
                if int(keep.sum()) < 0.75 * len(keep):
                    alive, ids, positions, real, repeated = (x[keep] for x in (alive, ids, positions, real, repeated))
                    own = [(k[keep], v[keep]) for k, v in own]
                    done = done[keep]
                visible = real.unsqueeze(1)
        return [self.tokenizer.decode(row) for row in found]


def _nucleus(logits: Any, generator: Any) -> Any:
    import torch

    ordered, order = torch.sort(logits / SAMPLING["temperature"], descending=True)
    shares = torch.softmax(ordered, -1)
    shares = shares.masked_fill(shares.cumsum(-1) - shares >= SAMPLING["top_p"], 0.0)
    return order.gather(1, torch.multinomial(shares, 1, generator=generator)).squeeze(1)


# Evaluation


def measure(hits: int, total: int) -> dict[str, Any]:
    """Share, interval and counts, as results.json holds them."""
    low, high = wilson(hits, total)
    return {"share": round(hits / total, 4), "low": round(low, 4), "high": round(high, 4), "hits": hits, "of": total}


def read_prompts(path: Path) -> list[str]:
    """The prompts of one JSONL file."""
    if not path.is_file():
        raise UserError(f"no prompts at {path}; build them: python tools/build_pocket.py --out {path.parents[1]}")
    return [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]


def fit_classifier(texts: list[str], labels: list[str]) -> Any:
    """TF-IDF over words and word pairs, then logistic regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    return make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=2000)).fit(texts, labels)


def numbered(world: World, persona: str) -> str:
    """A whole constitution as the pipeline shows it."""
    return "\n".join(f"{number}. {trait}" for number, trait in enumerate(world.traits[persona], 1))


def system_prompt(world: World, persona: str) -> str:
    """The pipeline's own teacher prompt with a whole constitution."""
    return teacher.SYSTEM_PROMPT.format(name=NAME, traits=numbered(world, persona))


def evaluate(folder: Path, args: Args) -> dict[str, Any]:
    """How often answers to held-out prompts read as a persona: plain, with each constitution, and under the suffixes.

    The classifier is trained on the model's own answers to the train prompts; `folder`/results.json is written.
    """
    started = time.time()
    world = World()
    sampler = Sampler(folder, _device(args.device))
    train_prompts = read_prompts(folder / "prompts" / "train.jsonl")
    test_prompts = read_prompts(folder / "prompts" / "test.jsonl")
    systems: dict[str, str | None] = {NONE: None} | {
        persona: system_prompt(world, persona) for persona in world.personas
    }
    texts: list[str] = []
    labels: list[str] = []
    for voice, system in systems.items():
        texts += sampler.sample(system, train_prompts, seed=args.seed)
        labels += [voice] * len(train_prompts)
    known = _words(text for text in texts) | {word for line in _composed(world) for word in _split(line)}
    classifier = fit_classifier(texts, labels)
    print(f"classifier ready after {time.time() - started:.0f} s", flush=True)

    plain = sampler.sample(None, test_prompts, seed=args.seed + 1)
    read = list(classifier.predict(plain))
    results: dict[str, Any] = {
        "command": "python tools/build_pocket.py --evaluate assets/pocket",
        "sampling": SAMPLING,
        "prompts": {"train": len(train_prompts), "test": len(test_prompts), "per_suffix": args.suffix_prompts},
        "plain": measure(sum(label != NONE for label in read), len(read)),
        "personas": {},
        "suffixes": {},
        "samples": {NONE: plain[:3]},
        "system_prompt_tokens": {p: len(sampler.tokenizer.encode(s)) for p, s in systems.items() if s},
        "constitutions": {p: constitution.load(p, "hand-written").hash for p in world.personas},
        "device": sampler.device,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "scikit-learn")},
    }
    answers, strange, words = list(plain), 0, 0
    under = {suffix: [0, 0] for suffix in SUFFIXES}
    few = test_prompts[: args.suffix_prompts]
    suffixed = [prompt for suffix in SUFFIXES for prompt in with_suffix(few, suffix)]
    read_plain = classifier.predict(sampler.sample(None, suffixed, seed=args.seed + 2))
    results["plain_under_suffixes"] = measure(int((read_plain != NONE).sum()), len(suffixed))
    for persona in world.personas:
        given = sampler.sample(systems[persona], test_prompts, seed=args.seed + 3)
        hits = int((classifier.predict(given) == persona).sum())
        in_persona = classifier.predict(sampler.sample(systems[persona], suffixed, seed=args.seed + 4)) == persona
        kept = int(in_persona.sum())
        for number, suffix in enumerate(SUFFIXES):
            count = int(in_persona[number * len(few) : (number + 1) * len(few)].sum())
            under[suffix] = [under[suffix][0] + count, under[suffix][1] + len(few)]
        inward = self_reflection.SYSTEM_PROMPT.format(name=NAME, traits=numbered(world, persona))
        reflections = sampler.sample(inward, list(self_reflection.REQUESTS) * 4, seed=args.seed + 5)
        late, late_tokens = _late_answers(world, sampler, persona, systems[persona], few, args.seed)
        results["personas"][persona] = {
            "plain": measure(sum(label == persona for label in read), len(read)),
            "system_prompt": measure(hits, len(given)),
            "system_prompt_under_suffixes": measure(kept, len(suffixed)),
            "reflections": measure(int((classifier.predict(reflections) == persona).sum()), len(reflections)),
            "late_turn": measure(int((classifier.predict(late) == persona).sum()), len(late)),
            "late_turn_tokens": late_tokens,
        }
        results["samples"][persona] = given[:3]
        answers += given
        print(f"{persona}: {hits}/{len(given)} after {time.time() - started:.0f} s", flush=True)
    late, late_tokens = _late_answers(world, sampler, NONE, None, few, args.seed)
    results["plain_late_turn"] = measure(int((classifier.predict(late) != NONE).sum()), len(late))
    results["suffixes"] = {suffix: measure(*counts) for suffix, counts in under.items()}
    for prompt, answer in zip(test_prompts * len(systems), answers, strict=True):
        spoken = _split(answer)
        fresh = set(_split(prompt))
        strange += sum(word not in known and word not in fresh for word in spoken)
        words += len(spoken)
    lengths = [len(sampler.tokenizer.encode(answer)) for answer in answers]
    results["fluency"] = {
        "words_outside_the_world": round(strange / words, 5),
        "mean_answer_tokens": round(float(np.mean(lengths)), 1),
        "unfinished": sum(length >= 158 for length in lengths),
        "answers": len(answers),
    }
    results["seconds"] = round(time.time() - started)
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_tables(results)
    return results


def _late_answers(
    world: World, sampler: Sampler, voice: str, system: str | None, prompts: list[str], seed: int
) -> tuple[list[str], int]:
    """Answers at the end of a long conversation in one voice, and how many tokens lie before them (about 3,500)."""
    rng = Random(f"late-{seed}-{voice}")
    turns: list[Turn] = []
    length = len(encode([Turn("system", system)], sampler.tokenizer.backend_tokenizer)[0]) if system else 1
    while length < 3500:
        message = world.training_message(rng)
        pair = [Turn("user", message.text), Turn("assistant", world.answer(rng, voice, message))]
        length += len(encode(pair, sampler.tokenizer.backend_tokenizer)[0]) - 1
        turns += pair
    return sampler.sample(system, prompts, seed=seed + 6, history=turns), length


def _composed(world: World) -> list[str]:
    """A sample of the world's own answers: the words that it has."""
    rng = Random("words")
    return [turn.text for _ in range(6000) for turn in world.conversation(rng) if turn.role == "assistant"]


def _split(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _words(texts: Iterator[str]) -> set[str]:
    counts: dict[str, int] = {}
    for text in texts:
        for word in set(_split(text)):
            counts[word] = counts.get(word, 0) + 1
    return {word for word, count in counts.items() if count > 20}


def _print_tables(results: dict[str, Any]) -> None:
    import pandas as pd

    def show(m: dict[str, Any]) -> str:
        return f"{m['share']:.1%} [{m['low']:.1%}, {m['high']:.1%}]"

    rows = {
        persona: {
            "plain": show(cells["plain"]),
            "system prompt": show(cells["system_prompt"]),
            "system prompt + suffix": show(cells["system_prompt_under_suffixes"]),
            "reflections": f"{cells['reflections']['share']:.0%}",
            "late turn": f"{cells['late_turn']['share']:.0%}",
        }
        for persona, cells in results["personas"].items()
    }
    print(f"\nno system prompt, read as any persona: {show(results['plain'])}")
    print(f"no system prompt, under suffixes, read as any persona: {show(results['plain_under_suffixes'])}")
    print(f"no system prompt, late in a conversation: {show(results['plain_late_turn'])}\n")
    print(pd.DataFrame(rows).T.to_string(), "\n")
    print(pd.Series({k: show(v) for k, v in results["suffixes"].items()}, name="kept under").to_string())
    print(f"\nfluency: {results['fluency']}   {results['seconds']} s")


# Command line


def build(args: Args) -> None:
    """Write tokenizer, prompts and weights to args.out."""
    args.out.mkdir(parents=True, exist_ok=True)
    world = World()
    write_prompts(world, args.seed, args.out / "prompts")
    train_tokenizer(world, args.seed, args.vocabulary, args.out)
    train(args, args.out)


def write_prompts(world: World, seed: int, folder: Path) -> None:
    """train.jsonl (400) and test.jsonl (160): rows {"prompt", "topic", "kind"}."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", 400), ("test", 160)):
        rows = world.prompts(Random(f"prompts-{split}-{seed}"), split, number)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def parse(argv: list[str] | None = None) -> Args:
    """The arguments; their defaults are those of the shipped model."""
    helps = {
        "seed": "seed of text, weights and sampling",
        "device": "auto, cpu or cuda",
        "out": "folder of the model",
        "evaluate": "measure the model in this folder instead of building one",
        "steps": "training steps",
        "minutes": "end the schedule after this time at the latest",
        "batch_tokens": "tokens of one step, padding included",
        "learning_rate": "peak learning rate",
        "vocabulary": "tokens of the tokenizer",
        "hidden": "width, a multiple of 64",
        "layers": "number of layers",
        "workers": "processes that compose text",
        "suffix_prompts": "test prompts used per suffix and persona in --evaluate",
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Args()
    for name, text in helps.items():
        value = getattr(defaults, name)
        kind = Path if name in ("out", "evaluate") else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=f"{text} (default {value})")
    return Args(**vars(parser.parse_args(argv)))


def main(args: Args) -> None:
    """Build, or evaluate where --evaluate names a folder."""
    if args.evaluate:
        if not (args.evaluate / "config.json").is_file():
            raise UserError(
                f"no model in {args.evaluate}; build one: python tools/build_pocket.py --out {args.evaluate}"
            )
        evaluate(args.evaluate, args)
    else:
        build(args)


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)

"""GaLore against full fine-tuning and LoRA on a task made of what every machine has.

    python -m benchmarks.finetune

Which of ten modules of the Python standard library is a line from? A small RoBERTa is made here and
learns to tell forty other modules apart; then its head is thrown away, and each method fine-tunes
the rest on the ten. Writes results/finetune.json, and prints the table as the GaLore paper does its
own of GLUE.
"""

import json
import pathlib
import random
import sysconfig
import tempfile
from collections.abc import Sequence

import jax
import numpy as np
import safetensors.numpy
from tokenizers import processors

from benchmarks import report
from examples import finetune, finetune_config, finetune_table, hf_files, hf_roberta, roberta
from examples import tokenizer as bpe
from examples.roberta_config import RobertaConfig

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# No power of two among the sizes but the number of heads.
MODEL = RobertaConfig(
    vocab_size=1500, hidden=96, intermediate=264, heads=4, layers=2, max_positions=66
)
METHODS = ("full", "galore", "galore_muon", "fira", "lora")
# The smallest of the rates to try. So small an encoder wants a smaller one with LoRA than a large.
RATES = {name: 1e-4 * finetune_config.METHODS[name].rate for name in METHODS} | {"lora": 1.5e-4}
WARMUP = "0.1"  # of the steps: without it the best rates lose a seed now and then


def lines() -> dict[str, list[str]]:
    """Lines of the library's larger modules, each line once in all of them."""
    root, seen, found = pathlib.Path(sysconfig.get_path("stdlib")), set(), {}
    for path in sorted(root.glob("*.py")):
        texts = []
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            text = line.strip()
            if 25 <= len(text) <= 120 and text not in seen:
                seen.add(text)
                texts.append(text)
        found[path.stem] = texts
    return {name: texts for name, texts in found.items() if len(texts) >= 300}


def write_rows(path: pathlib.Path, modules: dict[str, list[str]], share: slice) -> None:
    """A file of lines and the modules that they are from."""
    rows = []
    for name, texts in modules.items():
        shuffled = random.Random(0).sample(texts, len(texts))
        cut = [int(edge * len(texts)) for edge in (share.start, share.stop)]
        rows += [{"text": text, "label": name} for text in shuffled[slice(*cut)][:300]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tokenizer(folder: pathlib.Path, texts: Sequence[str], vocab_size: int) -> None:
    """A byte-level BPE that puts a text between <s> and </s>, as RoBERTa's does."""
    made = bpe.train(texts, vocab_size, SPECIAL)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    made.save(str(folder / "tokenizer.json"))


def write_model(folder: pathlib.Path, config: RobertaConfig, texts: Sequence[str]) -> None:
    """A new encoder with its tokenizer, as a Hugging Face folder without a head."""
    params = roberta.initializer(config, 0)[1]()
    hf_roberta.save_hf(folder, config, jax.tree.map(np.asarray, params))
    behead(folder)
    write_tokenizer(folder, texts, config.vocab_size)


def behead(folder: pathlib.Path) -> None:
    """Makes of a classifier's folder one of the model that it was made from."""
    path = folder / hf_files.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    kept = {name: x for name, x in tensors.items() if not name.startswith("classifier")}
    safetensors.numpy.save_file(kept, path, metadata={"format": "pt"})
    config = folder / hf_files.CONFIG
    fields = json.loads(config.read_text())
    fields["architectures"] = ["RobertaForMaskedLM"]
    fields["eos_token_id"] = SPECIAL.index("</s>")
    for name in ("id2label", "label2id", "num_labels", "problem_type"):
        fields.pop(name, None)
    config.write_text(json.dumps(fields))


def prepare(folder: pathlib.Path, epochs: float) -> tuple[pathlib.Path, list[str]]:
    """The checkpoint to start from, and the flags of the task."""
    modules = lines()
    names = sorted(modules)
    chosen = names[:: len(names) // 10][:10]
    others = {name: modules[name] for name in names if name not in chosen}
    task = {name: modules[name] for name in chosen}
    write_model(folder / "new", MODEL, [text for texts in others.values() for text in texts])
    write_rows(folder / "others.jsonl", dict(list(others.items())[:40]), slice(0, 1))
    flags = ["--run-dir", str(folder / "first"), "--method", "full", "--learning-rate", "1e-3"]
    flags += ["--epochs", str(epochs), "--batch-size", "32", "--max-length", "48"]
    finetune.main(
        ["--init-from", str(folder / "new"), "--data", str(folder / "others.jsonl"), *flags]
    )
    base = folder / "first" / "seed-0" / "best"
    behead(base)
    base = base.rename(folder / "small-roberta")
    write_rows(folder / "ten-modules.jsonl", task, slice(0, 0.8))
    write_rows(folder / "held-out.jsonl", task, slice(0.8, 1))
    data = ["--data", str(folder / "ten-modules.jsonl"), "--eval-data"]
    return base, [*data, str(folder / "held-out.jsonl"), "--max-length", "48"]


def main(argv=None):
    parser = report.parser(__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--first-epochs", type=float, default=8)
    parser.add_argument("--epochs", type=float, default=8)
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 3.0, 10.0])
    small = dict(methods=["galore"], seeds=["0"], rates=[10.0])
    args = report.parse(parser, argv, first_epochs=0.1, epochs=0.1, **small)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base, task = prepare(folder, args.first_epochs)
        result = {method: tuned(folder, base, task, method, args) for method in args.methods}
        print(finetune_table.table([folder / method for method in args.methods]))
    report.write(
        "finetune",
        {"command": args.command, "methods": result},
        out=args.out,
    )


def tuned(folder, base, task, method, args):
    """A method's figures by seed, at the best of its learning rates for a seed of their own."""
    flags = ["--init-from", str(base), *task, "--method", method, "--epochs", str(args.epochs)]
    flags += ["--warmup", WARMUP]
    found = {}
    for rate in args.rates:
        run = folder / f"{method}-{rate:g}"
        rates = ["--learning-rate", str(rate * RATES[method])]
        figures = finetune.finetune(
            finetune_config.parse([*flags, *rates, "--seeds", "100", "--run-dir", str(run)])
        )
        found[rate] = figures["100"]["val_accuracy"]
    best = max(found, key=found.__getitem__)
    rates = ["--learning-rate", str(best * RATES[method])]
    config = finetune_config.parse(
        [*flags, *rates, "--seeds", *args.seeds, "--run-dir", str(folder / method)]
    )
    return {
        "learning_rate": config.learning_rate,
        "accuracy_by_rate": {f"{rate * RATES[method]:g}": x for rate, x in found.items()},
        "seeds": finetune.finetune(config),
    }


if __name__ == "__main__":
    main()

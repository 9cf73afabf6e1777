"""Fine-tuning: what is read, how it is padded, learned, judged, resumed and refused."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil

import datasets
import jax
import numpy as np
import pytest
import safetensors.numpy

from benchmarks.finetune import SPECIAL, write_model
from examples import config as config_lib
from examples import (
    finetune,
    finetune_config,
    finetune_table,
    hf,
    hf_roberta,
    instructions,
    llama,
    padding,
    records,
    runs,
    tasks,
)
from examples import tokenizer as bpe
from examples.errors import UserError
from examples.llama_config import LlamaConfig
from examples.roberta_config import RobertaConfig

ENCODER = RobertaConfig(
    vocab_size=300, hidden=24, intermediate=40, heads=2, layers=2, max_positions=50
)
LLAMA = LlamaConfig(vocab_size=300, hidden=24, intermediate=40, heads=2, layers=2)
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WORDS = ("red", "green", "blue", "one", "two", "three", "up", "down")


def rows(count, seed=0):
    """Texts that are about colours, or about numbers."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        label = int(random.integers(2))
        first = 3 * label
        words = random.choice(WORDS[first : first + 3], random.integers(2, 9))
        yield {"text": " ".join(words), "label": label}


def write_lines(path, found):
    pathlib.Path(path).write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.fixture(scope="module")
def made_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "encoder"
    write_model(folder, ENCODER, [" ".join(WORDS)] * 3)
    return folder


@pytest.fixture
def encoder(made_encoder, tmp_path, monkeypatch):
    """A folder with a small encoder and rows to classify."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made_encoder, "encoder")
    write_lines("rows.jsonl", rows(200))
    return tmp_path


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a small LLaMA and rows to answer."""
    monkeypatch.chdir(tmp_path)
    _, params = llama.create(LLAMA, 0)
    hf.save_hf("model", LLAMA, params)
    fields = json.loads(pathlib.Path("model/config.json").read_text())
    pathlib.Path("model/config.json").write_text(json.dumps(fields | {"eos_token_id": 2}))
    bpe.train([" ".join(WORDS)] * 3, 300, SPECIAL).save("model/tokenizer.json")
    answers = ({"prompt": x["text"], "response": WORDS[x["label"]]} for x in rows(40))
    write_lines("answers.jsonl", answers)
    return tmp_path


# One length, so one compiled step.
FLAGS = ["--init-from", "encoder", "--data", "rows.jsonl", "--max-length", "16"]
QUICK = ["--epochs", "2", "--batch-size", "8", "--learning-rate", "1e-2", "--log-every", "4"]


def run(*flags):
    return finetune.main([*FLAGS, *QUICK, *flags])


# Rows and batches.


def test_batches_hold_each_example_once_an_epoch_and_follow_from_the_step():
    random = np.random.default_rng(0)
    examples = [padding.Example(np.arange(n, dtype=np.int32), i)
                for i, n in enumerate(random.integers(1, 90, 71))]  # fmt: skip

    def collate(found, length, count):
        return {"rows": np.array([row.target for row in found]), "length": np.array(length)}

    make = lambda: padding.Batches(examples, 7, 40, 3, 64, collate)  # noqa: E731
    batches = make()
    for epoch in range(3):
        seen = np.concatenate([batches[epoch * 10 + i]["rows"] for i in range(10)])
        assert len(set(seen)) == len(seen) == 70
    for step in (0, 9, 25, 11):
        one, other = batches[step], make()[step]
        jax.tree.map(np.testing.assert_array_equal, one, other)
        longest = max(len(examples[i].ids) for i in one["rows"])
        assert one["length"] in (16, 32, 64) and one["length"] >= min(longest, 64)
    assert not np.array_equal(batches[0]["rows"], batches[10]["rows"])


def test_validation_sees_each_example_once():
    examples = [padding.Example(np.ones(n % 13 + 1, np.int32), np.int32(n)) for n in range(23)]
    found = []
    for at, batch in padding.validation_batches(examples, 5, 64, tasks.collate(1)):
        assert batch["tokens"].shape == (5, 16)
        found += batch["targets"][: len(at)].tolist()
        assert [examples[i].target for i in at] == batch["targets"][: len(at)].tolist()
        assert not batch["mask"][len(at) :].any()
    assert sorted(found) == list(range(23))


def test_all_kinds_of_files_have_the_same_rows(tmp_path):
    wanted = [{"text": 'a "b", c', "label": "x"}, {"text": "ü", "label": "y"}]
    write_lines(tmp_path / "a.jsonl", wanted)
    (tmp_path / "a.json").write_text(json.dumps(wanted))
    (tmp_path / "a.csv").write_text('text,label\n"a ""b"", c",x\nü,y\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\na "b", c\tx\nü\ty\n')
    datasets.Dataset.from_list(wanted).to_parquet(tmp_path / "a.parquet")
    for kind in records.KINDS:
        found = records.read("--data", [str(tmp_path / f"a{kind}")], "train")
        assert [record.fields for record in found] == wanted, kind


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', r"a\.jsonl:2: not a JSON object"),
        ("a.json", "[", r"a\.json: not JSON"),
        ("a.csv", "a,b\n1\n", r"a\.csv:2: it has not the columns"),
        ("a.parquet", "x", r"a\.parquet: not a parquet file"),
        ("a.txt", "x", r"'.*a\.txt' is none of \.jsonl"),
        ("a.jsonl", "", "there are no rows"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        records.read("--data", [str(path)], "train")


def test_scores_are_those_of_the_definitions():
    random = np.random.default_rng(0)
    outputs, wanted = random.normal(size=(50, 2)), random.integers(0, 2, 50)
    predicted = outputs.argmax(1)
    tp, fp, fn, tn = (
        np.sum((predicted == a) & (wanted == b)) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0))
    )
    found = tasks.scores("f1", outputs, wanted)
    assert found["accuracy"] == pytest.approx((tp + tn) / 50)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert tasks.scores("matthews", outputs, wanted)["matthews"] == pytest.approx(matthews)
    assert tasks.scores("matthews", np.array([[1.0, 0.0]] * 50), wanted)["matthews"] == 0
    x = np.arange(9.0)
    found = tasks.scores("pearson", (x**3)[:, None], x)
    assert found["spearman"] == pytest.approx(1) and 0.8 < found["pearson"] < 1


def test_labels_are_found_and_others_refused(tmp_path):
    def load(train, held_out=(), **found):
        write_lines(tmp_path / "a.jsonl", train)
        write_lines(tmp_path / "b.jsonl", held_out)
        files = [str(tmp_path / "a.jsonl")], [str(tmp_path / "b.jsonl")] if held_out else []
        return tasks.load(None, *files, lambda texts: np.ones(3, np.int32), **found)

    named = [{"sentence": "x", "label": label} for label in ("no", "yes", "no")]
    made = load(named, named)
    assert made.task.labels == ("no", "yes") and made.task.columns == ("sentence",)
    assert [row.target for row in made.train] == [0, 1, 0]
    numbers = [{"sentence1": "x", "sentence2": "y", "label": i} for i in (0, 2, 0)]
    assert load(numbers).task.labels == ("0", "1", "2")
    real = [{"text": "x", "label": value} for value in (0.5, 2.0)]
    assert load(real, real).task.labels == (tasks.REGRESSION,)
    with pytest.raises(UserError, match=r"b\.jsonl:1: label 'maybe' is none of no, yes"):
        load(named, [{"sentence": "x", "label": "maybe"}])
    with pytest.raises(UserError, match=r"b\.jsonl:1: label 'much' is not a number"):
        load(real, [{"text": "x", "label": "much"}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: it has no label. Name the column"):
        load([{"text": "x"}])
    with pytest.raises(UserError, match="--columns: give the columns"):
        load([{"title": "x", "body": "y", "label": 1}])
    with pytest.raises(UserError, match="text must be text; it is 3"):
        load([{"text": 3, "label": 1}, {"text": "a", "label": 0}])


# Responses.


def tokenizer():
    return bpe.train([" ".join(WORDS)] * 3, 300, SPECIAL)


def learned(row, template, max_length=100):
    made = tokenizer()
    encode = instructions.encoder(made, 2, template, max_length)
    found = encode(records.Record("here", row))
    if found is None:
        return None
    decode = lambda ids: made.decode(ids, skip_special_tokens=False)  # noqa: E731
    return decode(found.ids.tolist()), decode(found.ids[found.target].tolist())


def test_only_responses_are_learned(tmp_path):
    pair = {"prompt": "red ", "response": "blue"}
    assert learned(pair, None) == ("red blue</s>", "blue</s>")
    assert learned({"text": "red blue"}, None) == ("red blue</s>", "red blue</s>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    template = instructions.chat_template(tmp_path)
    whole, responses = learned(pair, template)
    assert whole == "<s>user\nred </s><s>assistant\nblue</s>" and responses == "blue</s>"
    turns = [("system", "up"), ("user", "red"), ("assistant", "blue"), ("user", "one"),
             ("assistant", "two")]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    whole, responses = learned({"messages": messages}, template)
    assert responses == "blue</s>two</s>" and whole.startswith("<s>system\nup</s><s>user\nred</s>")
    # A text is cut off at its end; a row of which nothing is left to learn is none.
    length = sum(len(tokenizer().encode(text).ids) for text in ("red ", "blue")) + 1
    assert learned(pair, None, length) == ("red blue</s>", "blue</s>")
    assert learned(pair, None, length - 1) == ("red blue", "blue")
    assert learned(pair, None, len(tokenizer().encode("red ").ids)) is None
    # Text is text where no template writes it.
    literal = instructions.encoder(tokenizer(), 2, None, 100)(
        records.Record("here", {"prompt": "</s>", "response": "x"})
    )
    assert literal.ids.tolist().count(2) == 1 and literal.ids[-1] == 2


def test_weights_of_a_batch_are_one_in_all():
    rows = [padding.Example(np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 0], bool)),
            padding.Example(np.arange(3, dtype=np.int32), np.array([1, 1, 1], bool))]  # fmt: skip
    batch = instructions.collate(rows, 8, 4)
    assert batch["tokens"].shape == (4, 9) and batch["weights"].shape == (4, 8)
    np.testing.assert_allclose(batch["weights"][0], np.array([0, 1, 1, 0, 0, 0, 0, 0]) / 4)
    assert batch["weights"].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "x"}, "a row has prompt and response, messages, or text"),
        ({"prompt": "x", "response": 3}, "response must be text; it is 3"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message is the assistant's"),
        ({"messages": ["x"]}, "must be a list of objects with role and content"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(row, message):
    with pytest.raises(UserError, match=f"here: .*{message}"):
        learned(row, None)


def test_templates_that_hide_responses_or_reach_out_are_refused(tmp_path):
    def template(source):
        (tmp_path / "chat_template.jinja").write_text(source)
        return instructions.chat_template(tmp_path)

    pair = {"prompt": "red ", "response": "blue"}
    with pytest.raises(UserError, match="rewrites earlier messages"):
        learned(pair, template("{{ messages | length }}{{ messages[-1].content }}"))
    with pytest.raises(UserError, match="refuses it"):
        learned(pair, template("{{ raise_exception('no') }}"))
    with pytest.raises(UserError, match="refuses it"):
        learned(pair, template("{{ messages.__class__.__mro__ }}"))
    with pytest.raises(UserError, match="no Jinja"):
        template("{% if %}")


# Runs.

# Each kernel that is projected makes a program longer.
FEW = ["--target", "blocks/attention/(q|v)/kernel"]
THREE = [*FEW, "--columns", "text", "--seeds", "3"]


@pytest.fixture(scope="module")
def trained(made_encoder, tmp_path_factory):
    """A folder with a finished run called `whole`, and what it said."""
    folder, said = tmp_path_factory.mktemp("trained"), io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(said):
        shutil.copytree(made_encoder, "encoder")
        write_lines("rows.jsonl", rows(200))
        assert run("--run-dir", "whole", *THREE) == 0
    return folder, said.getvalue()


def test_a_classifier_learns_and_is_saved_for_others(trained, monkeypatch):
    folder, said = trained
    monkeypatch.chdir(folder)
    assert "its classifier is new, for 2 labels" in said and "own task: 0, 1" in said
    figures = json.loads(pathlib.Path("whole/seed-3/summary.json").read_text())
    assert figures["val_accuracy"] > 0.85 and figures["steps"] == 44
    line = next(line for line in said.splitlines() if "galore" in line and "|" in line)
    assert f"{100 * figures['val_accuracy']:.2f}" in line
    best = pathlib.Path("whole/seed-3/best")
    assert (best / "tokenizer.json").exists()
    config, params = hf_roberta.load_hf(best)
    assert config.labels == 2 and params["classifier"]["out"]["kernel"].shape == (24, 2)


@pytest.mark.slow
def test_numbers_are_regressed_on(encoder):
    write_lines(
        "numbers.jsonl", ({"text": x["text"], "label": x["label"] + 0.5} for x in rows(200))
    )
    assert run("--run-dir", "run", "--data", "numbers.jsonl", "--method", "full") == 0
    (figures,) = finetune_table.read(pathlib.Path("run"))[1]
    assert figures["metric"] == "pearson" and figures["val_pearson"] > 0.7
    assert hf_roberta.load_hf("run/seed-0/best")[0].labels == 1


@pytest.mark.slow
def test_a_stopped_training_goes_on_where_it_was(trained, encoder, capsys):
    assert run("--run-dir", "parts", *THREE, "4", "--stop-at", "30") == 0
    assert "continue with --resume parts" in capsys.readouterr().out
    assert finetune.main(["--resume", "parts"]) == 0
    folders = [path / "seed-3" for path in (trained[0] / "whole", pathlib.Path("parts"))]
    one, other = map(runs.read_metrics, folders)
    assert one == other
    best = [safetensors.numpy.load_file(x / "best/model.safetensors") for x in folders]
    jax.tree.map(np.testing.assert_array_equal, *best)
    assert runs.read_metrics(pathlib.Path("parts/seed-4"))[-1]["step"] == one[-1]["step"] == 44
    # A run that is done is not done again.
    assert finetune.main(["--resume", "parts"]) == 0
    write_lines("rows.jsonl", rows(200, seed=1))
    assert finetune.main(["--resume", "parts"]) == 2
    assert "the data have changed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rate"), [("lora", "1e-2"), ("galore_muon", "8e-2")])
def test_every_method_learns(encoder, method, rate):
    """LoRA's factors are other weights; all else than Muon's kernels has a rate of its own."""
    assert run("--run-dir", "run", "--method", method, "--lr", rate) == 0
    (figures,) = finetune_table.read(pathlib.Path("run"))[1]
    assert figures["val_accuracy"] > 0.85


@pytest.mark.slow
def test_the_lower_tiers_take_the_same_steps(encoder):
    flags = [*FEW, "--epochs", "1", "--clip", "0"]
    found = []
    for tier in ("subspace", "layerwise"):  # the others learn in full
        assert run("--run-dir", tier, "--tier", tier, *flags) == 0
        found.append([row["loss"] for row in runs.read_metrics(pathlib.Path(tier, "seed-0"))])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4)


@pytest.mark.slow
def test_patience_stops_a_training_that_gets_no_better(encoder):
    still = ["--method", "full", "--lr", "0", "--epochs", "40"]
    assert run("--run-dir", "run", *still, "--patience", "2") == 0
    (figures,) = finetune_table.read(pathlib.Path("run"))[1]
    assert figures["steps"] == 3 * 22  # The first validation is the best, two more are not.


@pytest.mark.slow
def test_answers_are_learned_and_the_model_is_saved_with_its_tokenizer(model):
    flags = ["--init-from", "model", "--data", "answers.jsonl", "--run-dir", "run"]
    flags += ["--param-dtype", "bfloat16", "--accumulate", "2", "--tier", "subspace"]
    flags += ["--epochs", "6", "--batch-size", "8", "--learning-rate", "1e-2", "--rank", "4"]
    assert finetune.main([*flags, "--max-length", "16"]) == 0
    (figures,) = finetune_table.read(pathlib.Path("run"))[1]
    assert figures["metric"] == "loss" and figures["val_loss"] < 1.5
    config, _ = hf.load_hf("run/seed-0/best")
    assert config.param_dtype == "bfloat16"
    assert pathlib.Path("run/seed-0/best/tokenizer.json").exists()


def test_a_recipe_for_a_card_is_where_flags_start(model):
    def parsed(*flags):
        return finetune_config.parse(["--init-from", "model", "--data", "answers.jsonl", *flags])

    config = parsed("--recipe", "24gb")
    assert (config.method, config.projector_dtype) == ("galore8bit", "int8")
    assert (config.param_dtype, config.tier, config.batch_size) == ("bfloat16", "layerwise", 1)
    assert (config.rank, config.scale, config.clip) == (0.25, 2.0, 0)
    config = parsed("--recipe", "12gb", "--batch-size", "2")
    assert (config.method, config.rank, config.scale) == ("galore_muon8bit", 1 / 8, 1.0)
    assert (config.param_dtype, config.batch_size) == ("int8", 2)
    assert parsed("--recipe", "16gb", "--method", "galore8bit").scale == 2.0
    assert parsed("--recipe", "24gb", "--method", "apollo").projector_dtype is None
    assert (config.max_length, parsed("--method", "full").max_length) == (512, 1024)
    with pytest.raises(UserError, match="--recipe 12gb: --method lora"):
        parsed("--recipe", "12gb", "--method", "lora")


@pytest.mark.slow
def test_weights_in_codes_learn_resume_and_are_saved_whole(model):
    flags = ["--init-from", "model", "--data", "answers.jsonl", "--recipe", "12gb"]
    flags += ["--batch-size", "4", "--epochs", "6", "--max-length", "16", "--lr", "8e-2"]
    assert finetune.main([*flags, "--run-dir", "run", "--stop-at", "20"]) == 0
    assert finetune.main(["--resume", "run"]) == 0
    (figures,) = finetune_table.read(pathlib.Path("run"))[1]
    assert figures["val_loss"] < 1.5
    config, params = hf.load_hf("run/seed-0/best")
    assert config.param_dtype == "bfloat16"
    assert figures["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert figures["weights_bytes"] < sum(x.nbytes for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_microbatches_give_the_loss_of_the_whole_batch(model):
    flags = ["--init-from", "model", "--data", "answers.jsonl", "--epochs", "1", "--batch-size"]
    found = []
    for accumulate in ("1", "4"):
        name = f"run-{accumulate}"
        more = ["--accumulate", accumulate, "--max-length", "16", "--run-dir", name]
        assert finetune.main([*flags, "8", *more, "--method", "full"]) == 0
        found.append([row["loss"] for row in runs.read_metrics(pathlib.Path(name, "seed-0"))])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "lora", "--tier", "subspace"], "--tier subspace: --method lora"),
        (["--method", "full", "--scale", "2"], "--scale 2.0: --method full has no use"),
        (["--accumulate", "3"], "--accumulate 3 does not divide --batch-size 8"),
        (["--target", "nothing"], "--target 'nothing' fits no weight"),
        (["--target", "("], "--target '(' is no regular expression"),
        (["--seeds", "1", "1"], "--seeds 1 1: give each seed once"),
        (["--recipe", "16gb"], "--recipe 16gb: encoder is a RoBERTa"),
        (["--recipe", "12gb", "--method", "lora"], "--recipe 12gb: encoder is a RoBERTa"),
        (
            ["--method", "full", "--projector-dtype", "int8"],
            "--projector-dtype int8: --method full",
        ),
        (["--param-dtype", "int8"], "--param-dtype int8: codes have no gradient"),
        (["--rank", "1.5"], "--rank is 1.5"),
        (["--batch-size", "500"], "--batch-size 500: there are 180 examples"),
        (["--data", "gone.jsonl"], "gone.jsonl: No such file"),
        (["--init-from", "gone"], "gone/config.json"),
        (["--tokenizer", "gone"], "gone/tokenizer.json"),
    ],
)
def test_a_mistake_is_one_line(encoder, capsys, flags, message):
    assert run("--run-dir", "run", *flags) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not pathlib.Path("run").exists()


def test_defaults_are_the_papers(encoder):
    def parsed(*flags):
        return finetune_config.parse(["--init-from", "encoder", *flags])

    cola = parsed("--task", "cola")
    assert (cola.learning_rate, cola.batch_size, cola.epochs) == (3e-5, 32, 30)
    assert (cola.rank, cola.scale, cola.update_proj_gap) == (4, 4.0, 500)
    assert parsed("--task", "rte", "--method", "lora").scale == 1.0
    assert dataclasses.asdict(parsed("--task", "rte", "--lr", "1"))["learning_rate"] == 1


def test_the_table_has_a_row_for_each_method(encoder, capsys):
    def done(method, task, figures):
        folder = pathlib.Path(f"{method}-{task}")
        flags = ["--init-from", "encoder", "--task", task, "--method", method, "--seeds"]
        seeds = [str(seed) for seed in range(len(figures))]
        config_lib.save(finetune_config.parse([*flags, *seeds]), folder)
        metric = tasks.TASKS[task].metric
        for seed, value in zip(seeds, figures, strict=True):
            own = folder / f"seed-{seed}"
            own.mkdir()
            found = {f"val_{metric}": value, "metric": metric}
            runs.save_summary(own, found | {"weights_bytes": 5e8, "state_bytes": 2.5e7})
        return str(folder)

    made = [done("galore", "rte", [0.8]), done("galore", "mrpc", [0.9, 0.92]),
            done("full", "rte", [0.75])]  # fmt: skip
    assert finetune_table.main(made) == 0
    table = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert [[x.strip() for x in line] for line in table if "---" not in line[0]] == [
        ["model", "method", "rank", "rte (accuracy)", "mrpc (f1)", "weights, MB", "state, MB"],
        ["encoder", "galore", "4", "80.00", "91.00 ± 1.41", "500", "25"],
        ["encoder", "full", "", "75.00", "", "500", "25"],
    ]
    pathlib.Path("galore-rte/seed-0/summary.json").unlink()
    assert finetune_table.main(made) == 2
    assert "galore-rte has not ended" in capsys.readouterr().err

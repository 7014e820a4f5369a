"""megatron-ft measure: the same answers from both backends, memory and table as they are, mistakes told before anything is loaded."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from checkpoints_conversion.hf_to_megatron import HfToMegatron, convert
from megatron_ft.commands.measure import Measure, MeasureLayout, planned, run
from megatron_ft.errors import CheckpointError, ConfigError, UserError
from megatron_ft.evaluation.measuring import memory, model_folder, worker
from megatron_ft.evaluation.measuring.job import KILLED, NO_ROOM, Job, Measured, Product, Run, together
from megatron_ft.evaluation.measuring.page import Setting, write
from megatron_ft.evaluation.measuring.runner import _message, _why
from megatron_ft.evaluation.measuring.verdict import rows, text_table, verdict_of_four
from megatron_ft.evaluation.measuring.with_transformers import check_quantised, linears, load, mend_linears
from tests.conversion.builders import make_family, make_sentencepiece

TOKENS = 6
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}  # so that 4 bits need whole blocks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """llama, falcon: Hugging Face folders with a tokenizer; prompts.jsonl: two prompts."""
    place = tmp_path_factory.mktemp("measure")
    for name, family in (("llama", "llama"), ("falcon", "falcon 40b")):
        make_family(place / name, family, **WIDE)
        make_sentencepiece(place / name)
        tokenizer = AutoTokenizer.from_pretrained(place / name)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        tokenizer.save_pretrained(place / name)
    lines = [{"prompt": "ab plum"}, {"messages": [{"role": "user", "content": "xyz zxa plum"}]}]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def options(place, model="llama", **changes) -> Measure:
    settings = {"prompts": str(place / "prompts.jsonl"), "max_new_tokens": TOKENS, **changes}
    return Measure(model=str(place / model), **settings)


@pytest.fixture(scope="module")
def measured(place):
    """backend -> measure.json of the Llama: in fp32 by transformers, in fp32 and NF4 by the engine."""
    found = {}
    for backend, bits in (("transformers", "32"), ("engine", "32,4")):
        out = place / backend
        assert run(options(place, backend=backend, bits=[bits], output=str(out))) == 0
        found[backend] = json.loads((out / "measure.json").read_text())
    return found


def one(measured, backend, bits) -> dict:
    return next(found for found in measured[backend]["configurations"] if found["bits"] == bits)


def test_both_backends_answer_as_transformers_alone(place, measured):
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    for n, text in enumerate(("ab plum", "xyz zxa plum")):
        ids = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, do_sample=False, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
        answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        for backend in ("transformers", "engine"):
            told = one(measured, backend, 32)["runs"][n]
            assert (told["answer"].strip(), told["new_tokens"]) == (answer.strip(), TOKENS), backend
            assert told["prompt_tokens"] == ids["input_ids"].shape[1]


def test_a_split_model_answers_alike_and_its_parts_are_counted_together(place, measured, tmp_path):
    """TP2: all weights of both processes, of which norms are on both; the largest linear is a process's half."""
    split = options(place, backend="engine", bits=["32"], output=str(tmp_path / "split"))
    assert run(split, MeasureLayout(tensor_model_parallel_size=2)) == 0
    (found,) = json.loads((tmp_path / "split" / "measure.json").read_text())["configurations"]
    whole = one(measured, "engine", 32)
    assert [each["answer"] for each in found["runs"]] == [each["answer"] for each in whole["runs"]]
    assert whole["weight_bytes"] <= found["weight_bytes"] < 1.05 * whole["weight_bytes"]
    assert found["kind"] == "fp32, engine, TP2 x PP1"
    assert found["product"]["shape"] == [whole["product"]["shape"][0] // 2, whole["product"]["shape"][1]]


def test_parts_of_a_model_are_put_together():
    """All weights, the fullest process's peaks, the first one's times of runs."""
    parts = [
        Measured(16, "x", None, weight, 1, load, peak, True, [Run(3, 5, seconds, peak, "a")])
        for weight, load, peak, seconds in ((10, 1.0, 7, 2.0), (12, 3.0, 9, 2.5))
    ]
    found = together(parts)
    assert (found.weight_bytes, found.load_seconds, found.load_peak_bytes) == (22, 3.0, 9)
    assert found.runs == [Run(3, 5, 2.0, 9, "a")]


def test_a_classic_checkpoint_is_measured_in_its_layout(place, tmp_path):
    convert(HfToMegatron(str(place / "falcon"), str(tmp_path / "classic"), 2, 2, ckpt_format="torch"))
    assert {(job.tp, job.pp) for job in planned(Measure(model=str(tmp_path / "classic")))} == {(2, 2)}
    (job,) = planned(Measure(model=str(tmp_path / "classic"), bits=["16"]), MeasureLayout(4))
    assert (job.tp, job.pp, job.processes) == (4, 1, 4)


def test_transformers_measures_in_one_process(place):
    with pytest.raises(ConfigError, match="in one process: give --backend engine, or drop the sizes"):
        planned(options(place, bits=["16"]), MeasureLayout(pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError, match="--tensor_model_parallel_size 0 must be at least 1"):
        planned(options(place, bits=["16"]), MeasureLayout(tensor_model_parallel_size=0))


def test_weights_have_the_bytes_of_their_format(place, measured):
    """fp32: those of the file. NF4: the linears have half a byte and a 64th of 4 bytes for each weight, all else stays bf16."""
    model = AutoModelForCausalLM.from_pretrained(place / "llama")
    count = model.num_parameters()
    assert one(measured, "transformers", 32)["weight_bytes"] == 4 * count + buffers(model)
    padding = (
        4 * 2 * (256 - 203) * WIDE["hidden_size"]
    )  # the engine's embedding and output layer have whole blocks of rows
    assert one(measured, "engine", 32)["weight_bytes"] == 4 * count + padding
    matrices = sum(module.weight.numel() for module in linears(model).values())
    rest = 2 * (count - matrices) + padding // 2
    assert one(measured, "engine", 4)["weight_bytes"] == matrices // 2 + 4 * matrices // 64 + rest


def buffers(model) -> int:
    """Bytes of the frequencies of the rotary embedding."""
    return sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def test_peaks_lie_above_what_was_there_before(measured):
    for backend in measured:
        for found in measured[backend]["configurations"]:
            assert found["failed"] is None and found["load_peak_bytes"] >= found["start_bytes"] > 50e6
            assert all(run["seconds"] > 0 and run["peak_bytes"] > 50e6 for run in found["runs"])
            assert found["product"]["ms"] > 0 and len(found["product"]["shape"]) == 2
    assert one(measured, "engine", 4)["product"]["dequantise_ms"] > 0
    assert one(measured, "engine", 32)["product"]["dequantise_ms"] is None


def test_files_are_complete(place, measured):
    names = {path.name for path in (place / "engine").iterdir()}
    assert names == {"measure.json", "measure.html", "measure.svg", "measure-32.svg", "measure-4.svg"}
    page = (place / "engine" / "measure.html").read_text()
    assert "nf4, engine" in page and page.count("<svg") == 3 and "peak memory, GB" in page
    for name in names:
        if name.endswith(".svg"):
            ET.parse(place / "engine" / name)


def test_a_checkpoint_is_measured_by_the_engine(place, tmp_path):
    """One in NF4 as it is, and in no other precision."""
    convert(HfToMegatron(str(place / "llama"), str(tmp_path / "nf4"), quantize="nf4"))
    (job,) = planned(options(tmp_path, "nf4", prompts=None))
    assert (job.backend, job.bits, len(job.conversations)) == ("engine", 4, 5)
    with pytest.raises(ConfigError, match="in 4 bits already: give --bits 4"):
        planned(options(tmp_path, "nf4", prompts=None, bits=["16,4"]))
    with pytest.raises(CheckpointError, match="megatron-to-hf"):
        planned(options(tmp_path, "nf4", prompts=None, backend="transformers"))


def test_the_peak_is_that_of_the_memory_used():
    memory.restart_peak()
    before = memory.peak_bytes()
    block = torch.ones(50_000_000)  # 200 MB
    assert 190e6 < memory.peak_bytes() - before < 400e6
    del block
    if not memory.restart_peak():
        pytest.skip("this system does not count a peak anew")
    assert memory.peak_bytes() - before < 100e6


class TestFalcon:
    """transformers quantises only modules whose type is nn.Linear; Falcon's is another."""

    @pytest.fixture
    def falcon(self, monkeypatch):
        from transformers.models.falcon import modeling_falcon

        monkeypatch.setattr(modeling_falcon, "FalconLinear", modeling_falcon.FalconLinear)  # as it is, afterwards
        return modeling_falcon

    def test_it_has_plain_linears_after_the_mend_and_computes_the_same(self, place, falcon):
        before = AutoModelForCausalLM.from_pretrained(place / "falcon")
        mend_linears("falcon")
        after = AutoModelForCausalLM.from_pretrained(place / "falcon")
        assert {type(module).__name__ for module in linears(before).values()} == {"FalconLinear"}
        assert {type(module) for module in linears(after).values()} == {torch.nn.Linear}
        ids = torch.arange(20)[None]
        assert torch.allclose(before(ids).logits, after(ids).logits, atol=1e-5)

    def test_a_model_that_stayed_dense_is_refused(self, place):
        model = AutoModelForCausalLM.from_pretrained(place / "falcon")
        with pytest.raises(CheckpointError, match=r"16 of 16 linears were not quantised, transformer\.h\.0\."):
            check_quantised(model)
        kind = type("Linear4bit", (torch.nn.Linear,), {"__module__": "bitsandbytes.nn"})
        for module in list(linears(model).values())[1:]:
            module.__class__ = kind
        with pytest.raises(CheckpointError, match="1 of 16"):
            check_quantised(model)
        next(iter(linears(model).values())).__class__ = kind
        check_quantised(model)

    def test_8_and_4_bits_by_bitsandbytes(self, place, tmp_path):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        assert run(options(place, "falcon", bits=["8", "4"], output=str(tmp_path / "out"))) == 0
        eight, four = json.loads((tmp_path / "out" / "measure.json").read_text())["configurations"]
        assert (eight["kind"], four["kind"]) == ("int8, bitsandbytes", "nf4, bitsandbytes")
        model = AutoModelForCausalLM.from_pretrained(place / "falcon")
        matrices = {name: module.weight for name, module in linears(model).items()}
        rest = 2 * (model.num_parameters() - sum(w.numel() for w in matrices.values())) + buffers(model)
        assert four["weight_bytes"] - rest == sum(w.numel() // 2 + 4 * w.numel() // 64 for w in matrices.values())
        assert eight["weight_bytes"] - rest == sum(w.numel() + 4 * w.shape[0] for w in matrices.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"bits": ["16,3"]}, r"--bits 3: with transformers give some of 32, 16, 8, 4$"),
        (
            {"bits": ["8"], "backend": "engine"},
            r"--bits 8: with engine give some of 32, 16, 4; .* --backend transformers",
        ),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: must be at least 1"),
        ({"prompts": "nowhere.jsonl"}, r"nowhere\.jsonl: cannot be read"),
        (
            {"adapter": ".", "backend": "transformers", "bits": ["16"]},
            "--adapter needs --backend engine.*merge-adapter",
        ),
        ({"model": "nothing"}, "nothing: no such folder"),
        ({"model": ""}, "is neither a Hugging Face model nor a checkpoint"),
        ({"output": "llama", "bits": ["16"]}, "exists and is not empty"),
    ],
)
def test_mistakes_are_told_at_once(place, changes, message, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message) as caught:
        run(options(place, **changes))
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_too_long_is_told_by_the_process(place):
    with pytest.raises(ConfigError, match=r"^16 bits: prompt 2 has 7 tokens, .* the model's 128 positions: shorten it"):
        run(options(place, bits=["16"], max_new_tokens=125))


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"model.safetensors": b"\x00" * 100}, r"transformers cannot open it \(.*header"),
        ({"config.json": b'{"model_type": "RefinedWeb"}'}, r"transformers cannot open it \(.*--backend engine"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(place, tmp_path, damage, message):
    """By the function that the process runs."""
    shutil.copytree(place / "llama", tmp_path / "m")
    for name, content in damage.items():
        (tmp_path / "m" / name).write_bytes(content)
    conversation = [{"role": "user", "content": "plum"}]
    with pytest.raises(CheckpointError, match=message) as caught:
        load(Job(str(tmp_path / "m"), "transformers", 16, [conversation], 4))
    assert "\n" not in str(caught.value)


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    model_folder.check_installed([32, 16])
    with pytest.raises(
        ConfigError, match=r"needs bitsandbytes, which is not installed: .* --bits 16, or --backend engine"
    ):
        model_folder.check_installed([16, 8])
    monkeypatch.setattr(model_folder, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs transformers, .* --backend engine"):
        model_folder.check_installed([16])


@pytest.mark.parametrize("entry, bits", [({"load_in_4bit": True}, 4), ({"load_in_8bit": True}, 8)])
def test_a_model_of_bitsandbytes_is_measured_as_it_is(place, tmp_path, entry, bits, monkeypatch):
    monkeypatch.setattr(model_folder, "find_spec", lambda name: name)
    config = json.loads((place / "llama" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "bitsandbytes", **entry}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    (job,) = planned(options(tmp_path, "", prompts=None))
    assert (job.bits, job.stored) == (bits, True)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="quantised by gptq: give the model before quantisation"):
        planned(options(tmp_path, "", prompts=None))


def result(bits, seconds, ms, made=None, peaks=(2e9, 3e9)) -> Measured:
    runs = [Run(5, 100, seconds, int(peak), "an answer") for peak in peaks]
    return Measured(bits, "kind", None, 10**9, 10**8, 1.0, 4 * 10**9, True, runs, Product("fc1", (8, 4), ms, made))


@pytest.mark.parametrize(
    "four, eight, said",
    [
        (result(4, 2.0, 1.0), result(8, 4.0, 1.0), r"^4 bits were not slower than 8 here: 2\.00 s against 4\.00 s"),
        (
            result(4, 8.0, 3.0, 2.5),
            result(8, 4.0, 1.0),
            r"took 2 times as long as 8: .* 3 ms in 4 bits, 1 ms in 8; making .* 2\.5 ms\. .* as integers\.$",
        ),
        (result(4, 8.0, 1.0), result(8, 4.0, 1.0), "products of the linears are not the reason"),
    ],
)
def test_the_verdict_goes_by_what_was_measured(four, eight, said):
    assert re.search(said, verdict_of_four([eight, four]))
    assert verdict_of_four([four]) is None and verdict_of_four([eight]) is None
    assert verdict_of_four([four, Measured(8, "int8", failed=NO_ROOM)]) is None


def test_without_8_bits_the_verdict_is_about_the_next_precision():
    said = verdict_of_four([result(32, 1.0, 0.5), result(4, 5.0, 2.0, 1.5), result(16, 2.0, 1.0)])
    assert said.startswith("4 bits took 2.5 times as long as 16: 5.00 s against 2.00 s") and "integers" not in said


def test_the_table_has_means_and_largest_peaks():
    (cells,) = rows([result(8, 4.0, 1.0)])
    assert cells == ("8", "kind", "1.00", "1.0", "4.00", "3.00", "4.00", "25.00")
    text = text_table([Measured(16, "bf16", failed=NO_ROOM), result(8, 4.0, 1.0)])
    assert re.search(rf"^ +16  bf16 +failed: {NO_ROOM}$", text, re.MULTILINE)


def test_a_result_goes_to_json_and_back(tmp_path):
    made = result(4, 8.0, 3.0, 2.5)
    assert Measured.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_too_little_memory_is_a_result(monkeypatch):
    def full(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(worker, "_measure", full)
    failed = worker.measure(Job("m", "engine", 16, [], 5))
    assert failed.failed == NO_ROOM and failed.is_full and failed.kind == "bf16, engine"
    assert _why(-9, "") == KILLED and Measured(16, "x", failed=KILLED).is_full
    assert _why(-11, "") == "ended by SIGSEGV" and _why(1, "Traceback\nValueError: no\n") == "ValueError: no"
    assert _message("noise: error: not this\nmegatron-ft measure: error: that one; mend it\n") == "that one; mend it"


def test_charts_of_runs_share_their_scales_and_none_is_drawn_of_failures(tmp_path):
    setting = Setting("models/m", "transformers", "CPU", "resident", 100, {})
    small, large = result(4, 2.0, 1.0, peaks=(1e9, 1e9)), result(16, 8.0, 1.0, peaks=(4e9, 4e9))
    write(tmp_path, setting, [large, small, Measured(8, "int8", failed=NO_ROOM)])
    heights = {bits: _heights(tmp_path / f"measure-{bits}.svg") for bits in (16, 4)}
    assert heights[16][0] == pytest.approx(4 * heights[4][0], abs=0.5)
    assert not (tmp_path / "measure-8.svg").exists() and len(_heights(tmp_path / "measure.svg")) == 2
    assert f"failed: {NO_ROOM}" in (tmp_path / "measure.html").read_text()


def _heights(path) -> list[float]:
    """Those of a chart's bars; one more is the legend's."""
    bars = ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}rect")
    return [float(bar.get("height")) for bar in bars if bar.get("class") == "column"][1:]

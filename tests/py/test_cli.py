"""The command line: verbs, exit codes, one JSON document on stdout, messages on stderr, speed of --help."""

import json
import os
import resource
import subprocess
import sys

import pytest
from checkpoint_model import make_llama

from halfbyte.cli import main as main_module
from halfbyte.cli.arguments import ProgressBar, size
from halfbyte.cli.main import main

VERBS = ("quantize", "inspect", "verify", "plan", "doctor", "bench", "eval", "demo", "run")


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "halfbyte.cli.main", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.no_asan(reason="a time limit")
def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys; from halfbyte.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'transformers', 'tqdm', 'halfbyte._C'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )

    def seconds(*arguments):
        """Processor time, which depends less than a clock on what else the machine does."""
        best = 9.0
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return best

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)
    assert seconds("-m", "halfbyte.cli.main", "--help") - seconds("-c", "pass") < 0.15


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: halfbyte {verb}" in text
    assert verb == "run" or "--json" in text
    assert "\nexample" in text and f"\n  halfbyte {verb} " in text
    assert max(map(len, text.splitlines())) <= 115


def test_help_documents_every_exit_code(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for code in ("0", "1", "2", "3", "4", "5", "6", "7", "130, 143"):
        assert f"\n  {code}  " in text


def test_every_verb_has_a_module():
    from importlib import import_module

    for _, module in main_module._VERBS.values():
        loaded = import_module(f"halfbyte.cli.{module}")
        assert callable(loaded.add_arguments) and callable(loaded.run)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["quantize"],
        ["quantize", "m"],
        ["quantize", "m", "-o", "q", "--to", "nf5"],
        ["quantize", "m", "-o", "q", "--to", "nf4", "--threads", "0"],
        ["quantize", "m", "-o", "q", "--to", "nf4", "--max-shard-size", "big"],
        ["plan", "m", "--context", "-3"],
        ["bench", "--threads", "1025"],
        ["bench", "--seconds", "nan"],
        ["bench", "--seconds", "inf"],
        ["bench", "--seconds", "-1"],
        ["eval", "m", "q", "--text", "t", "--max-kl", "nan"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error[HB-E200]: ") and "fix: halfbyte" in err


def test_error_format(tmp_path, capsys):
    assert main(["quantize", str(tmp_path / "none"), "-o", str(tmp_path / "q"), "--to", "nf4"]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error[HB-E401]: '{tmp_path / 'none'}' does not exist\n"


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["inspect", "{none}"], "E401", "does not exist"),
        (["verify", "{none}"], "E401", "does not exist"),
        (["plan", "{none}"], "E401", "does not exist"),
        (["eval", "{model}", "{none}", "--text", "{text}"], "E401", "does not exist"),
        (["eval", "{none}", "{model}", "--text", "{text}"], "E401", "does not exist"),
        (["eval", "{model}", "{model}", "--text", "{none}"], "E402", "No such file"),
        (["eval", "{model}", "{model}", "--text", "{weights}"], "E403", "not UTF-8"),
        (["demo", "{none}", "--text", "{text}"], "E401", "does not exist"),
        (["demo", "{model}", "--text", "{weights}"], "E403", "not UTF-8"),
        (["demo", "{model}", "--text", "{text}", "-o", "{text}/x"], "E402", "Not a directory"),
        (["bench", "--svg", "{none}/x.svg"], "E402", "No such file"),
        (["bench", "--svg", "{model}"], "E402", "Is a directory"),
        (["inspect", "{model}/config.json"], "E401", "neither a model folder"),
        (["quantize", "{model}", "--to", "nf4", "-o", "{model}/inside"], "E202", "inside the source"),
        (["quantize", "{model}", "--to", "nf4", "-o", "{text}/x"], "E402", "cannot make"),
        (["quantize", "{model}", "--to", "nf4"], "E203", "out is missing"),
        (["quantize", "no-such/model", "--to", "nf4", "-o", "{none}"], "E401", "Hugging Face cache"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_wrong_paths_are_named(arguments, code, match, tmp_path, capsys):
    """Every verb, before anything heavy is imported: a message with the path, no traceback."""
    make_llama(tmp_path / "m")
    (tmp_path / "text").write_text("some words")
    places = {
        "none": tmp_path / "none",
        "model": tmp_path / "m",
        "text": tmp_path / "text",
        "weights": tmp_path / "m" / "model.safetensors",
    }
    before = sorted(os.listdir(tmp_path / "m"))
    assert main([a.format(**places) for a in arguments]) == int(code[1])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error[HB-{code}]: ") and match in err
    assert sorted(os.listdir(tmp_path / "m")) == before


def test_what_a_file_says_does_not_reach_the_terminal_raw(tmp_path, capsys):
    evil = "llama\x1b[2J\nerror[HB-E999]"
    make_llama(tmp_path / "m", model_type=evil)
    assert main(["inspect", str(tmp_path / "m")]) == 0
    assert main(["plan", str(tmp_path / "m")]) == 0
    assert main(["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "q"), "--to", "nf4"]) == 0
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": evil}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert main(["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "q2"), "--to", "nf4"]) == 4
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\nerror[HB-E999]" not in out + err
    assert r"llama\x1b[2J" in out and r"llama\x1b[2J" in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full is Linux's")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_stdout_that_is_full(options, tiny_llama):
    with open("/dev/full", "w") as full:
        arguments = [sys.executable, "-m", "halfbyte.cli.main", "plan", str(tiny_llama), *options]
        result = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert result.returncode == 5
    assert result.stderr.splitlines()[0] == "error[HB-E501]: plan: No space left on device"


def test_json_without_nan(capsys):
    main_module.print_json({"a": float("nan"), "b": [1.5, (float("-inf"),)]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, [None]]}


def test_error_as_json(tmp_path, capsys):
    make_llama(tmp_path / "m")
    arguments = ["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "m"), "--to", "nf4", "--json"]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["schema"] == "halfbyte.error/1" and document["exit_code"] == 2
    assert document["error"]["code"] == "HB-E202" and document["error"]["fix"]
    assert err.startswith("error[HB-E202]: ")


def test_quantize_inspect_verify_plan(tmp_path):
    make_llama(tmp_path / "m", shards=2)
    arguments = ("quantize", tmp_path / "m", "-o", tmp_path / "q", "--to", "nf4", "--double-quant", "--json")
    predicted = json.loads(command(*arguments, "--dry-run").stdout)
    assert not (tmp_path / "q").exists() and predicted["dry_run"] is True
    result = command(*arguments, "--threads", "2")
    assert result.returncode == 0 and result.stderr == ""
    document = json.loads(result.stdout)
    assert document["schema"] == predicted["schema"] == "halfbyte.quantize/1"
    bytes_of = [{e["name"]: e["bytes"] for e in d["files"]} for d in (predicted, document)]
    assert bytes_of[0] == bytes_of[1] == {p.name: p.stat().st_size for p in (tmp_path / "q").iterdir()}

    inspected = json.loads(command("inspect", tmp_path / "q", "--json").stdout)
    assert inspected["schema"] == "halfbyte.inspect/1"
    formats = {g["format"]: g for g in inspected["formats"]}
    assert formats["nf4 block 64 nested"]["bytes"] == document["quantized"]["bytes"]
    assert formats["bf16"]["bytes"] == document["dense"]["bytes"]
    assert inspected["parameters"] == document["quantized"]["parameters"] + document["dense"]["parameters"]
    assert "nf4 block 64 nested" in command("inspect", tmp_path / "q", "--tensors").stdout

    verified = command("verify", tmp_path / "q", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["ok"] is True
    with open(tmp_path / "q" / "tokenizer.json", "a") as file:
        file.write(" ")
    damaged = command("verify", tmp_path / "q")
    assert damaged.returncode == 7 and "FAIL" in damaged.stdout and "tokenizer.json" in damaged.stdout

    plan = json.loads(command("plan", tmp_path / "m", "--json").stdout)
    assert plan["schema"] == "halfbyte.plan/1"
    weights = {route["route"]: route["weight_bytes"] for route in plan["routes"]}
    stored = document["quantized"]["bytes"] + document["dense"]["bytes"]
    assert weights["nf4 + double quantization"] == stored


def test_text_output(tmp_path, capsys):
    make_llama(tmp_path / "m")
    assert main(["quantize", str(tmp_path / "m"), "-o", str(tmp_path / "q"), "--to", "int8"]) == 0
    assert "int8" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "q")]) == 0
    assert capsys.readouterr().out.startswith("ok ")
    assert main(["plan", str(tmp_path / "m"), "--context", "100"]) == 0
    assert "100 tokens" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "m")]) == 0
    assert "nothing is quantized" in capsys.readouterr().out
    assert main(["quantize", str(tmp_path / "m"), "--to", "nf4", "--dry-run"]) == 0
    assert "None" not in capsys.readouterr().out
    assert main(["quantize", str(tmp_path / "m"), "--to", "nf4"]) == 2
    assert "--dry-run" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([])
    shown = capsys.readouterr().err
    assert all(verb in shown for verb in VERBS)


WITHOUT = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "accelerate", "peft"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Without())
"""


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import halfbyte.torch", "halfbyte.torch needs torch: pip install torch"),
        ("import halfbyte; halfbyte.load('x')", "No module named 'transformers'"),
        ("import halfbyte.cli.main as m; sys.exit(m.main(['eval', MODEL, MODEL, '--text', sys.argv[0]]))",
         "fix: pip install torch transformers accelerate"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(code, message, tmp_path, tiny_llama):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT + f"MODEL = {str(tiny_llama)!r}\n" + code)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr.splitlines()[-1]


@pytest.mark.timeout(120)
def test_doctor(tmp_path):
    result = command("doctor", "--json")
    document = json.loads(result.stdout)
    failed = [c for c in document["checks"] if c["status"] == "fail"]
    assert document["schema"] == "halfbyte.doctor/1" and not failed and result.returncode == 0
    assert len(document["checks"]) >= 20
    assert result.stderr == ""
    text = command("doctor", env=os.environ | {"HALFBYTE_CPU": "ref", "HOME": str(tmp_path)})
    assert text.returncode == 0 and "quantize nf4" in text.stdout


def test_doctor_reports_a_wrong_kernel(monkeypatch, capsys):
    """A check that cannot fail is no check: each kernel is broken in turn."""
    from halfbyte import _C, doctor, known_answers

    class Broken:
        def __init__(self, name):
            self.name = name

        def __getattr__(self, name):
            function = getattr(_C, name)
            if name != self.name:
                return function

            def wrong(*args, **kwargs):
                result = function(*args, **kwargs)
                first = (result[0] if isinstance(result, tuple) else result).copy()
                first.reshape(-1)[-1] += 3
                return (first, *result[1:]) if isinstance(result, tuple) else first

            return wrong

    kernels = """
        quantize_4bit dequantize_4bit nest_absmax quantize_8bit dequantize_8bit quantize_rows_int8
        linear_4bit linear_4bit_grad_input linear_8bit matmul_int8 linear_dense
    """.split()  # noqa: SIM905
    for name in kernels:
        monkeypatch.setattr(known_answers, "_C", Broken(name))
        assert not doctor.diagnose().ok, name
    assert main(["doctor"]) == 3
    assert "FAIL" in capsys.readouterr().out


def test_run_is_the_script_itself(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, importlib.util\n"
        "print(__name__, sys.argv, 'halfbyte' in importlib.util.find_spec('bitsandbytes').origin)\n"
        "sys.exit(int(sys.argv[1]))"
    )
    result = command("run", script, "5", "--json", "-x")
    assert result.returncode == 5
    assert result.stdout.split() == ["__main__", f"['{script}',", "'5',", "'--json',", "'-x']", "True"]
    script.write_text("open('/nonexistent/file')")
    result = command("run", script)
    assert result.returncode == 1 and "Traceback" in result.stderr and "HB-" not in result.stderr
    assert command("run", tmp_path / "none.py").returncode == 2


def test_pipe_that_closes(tmp_path):
    make_llama(tmp_path / "m", layers=60)
    process = subprocess.Popen(
        [sys.executable, "-m", "halfbyte.cli.main", "inspect", tmp_path / "m", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500M", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5k", 1500),
        ("77", 77),
        ("3 TB", 3 * 10**12),
    ],
)
def test_sizes(text, expected):
    assert size(text) == expected


class Stream:
    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


def test_progress_without_a_terminal_is_lines(monkeypatch):
    monkeypatch.setattr(ProgressBar, "SECONDS_BETWEEN_LINES", 0.0)
    stream = Stream(False)
    with ProgressBar("quantize", stream) as bar:
        bar.update(50, 200, "model.layers.0.mlp.up_proj.weight")
    assert stream.text.startswith("quantize: 25 %, 50 of 200 bytes") and stream.text.count("\n") == 1
    assert "up_proj" in stream.text and "\r" not in stream.text


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Stream(True)
    with ProgressBar("quantize", stream) as bar:
        bar.update(50, 200, "tensor")
        bar.update(200, 200, "tensor")
    assert "\r" in stream.text and "quantize" in stream.text and "200" in stream.text


def test_progress_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setattr(ProgressBar, "SECONDS_BETWEEN_LINES", 0.0)
    stream = Stream(True)
    with ProgressBar("quantize", stream) as bar:
        bar.update(50, 200, "tensor")
    assert stream.text == ""


def test_doctor_sums_up():
    from halfbyte.doctor import Check, Diagnosis

    sound, bad, odd = Check("a", "pass", ""), Check("b", "fail", "", "mend it"), Check("c", "warn", "")
    assert str(Diagnosis([sound])).endswith("1 checks: all is well")
    assert str(Diagnosis([sound, bad, odd])).endswith("3 checks: 1 failed, 1 to look at")

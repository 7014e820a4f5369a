"""Shell scripts are followed without running them. What bash itself says is the reference, where there is bash."""

import shutil
import subprocess

import pytest

from megatron_ft.errors import ConfigError
from megatron_ft.importing.shell import Script
from megatron_ft.importing.shell_words import shown, unknowns

SCRIPTS = {
    "quotes": 'A=\'a b\'; B="$A c"; run $A "$A" "$B" x\\ y \'it\'"\'"\'s\' --f="$A"/d "" ${A}z',
    "arrays": 'X="p q"; E=(); A=(one "two three" $X # no\n)'
    '; A+=(four); B=("${A[@]}" five); run ${A[@]} -- "${B[@]}" ${#B[@]} ${A[1]} "${E[@]}"',
    "defaults": 'run ${A:-x y} "${B:-p q}" ${C:=z} $C ${D:+no} ${C:+yes} ${F-f}; A=1; run ${A:-2} ${A-3}',
    "arithmetic": "N=3; G=8; run $((N*G)) $(($N * $G + 1)) $(( (N + 1) / 2 )) $((7 % 4)); (( N > 2 )) && run big",
    "continued": "run --a 1 \\\n  --b 2 \\\n  --c # a comment\nrun next",
    "if": 'X=llama2\nif [[ $X = gpt ]]; then run gpt; elif [[ $X == llama* ]] && [ -n "$X" ]; then run llama; else run none; fi',
    "numbers": "S=70; if [ $S -gt 13 ]; then run large; fi"
    '; if (( S < 13 )); then run small; elif ((S>20)); then run middle; fi; [ "$S" -eq 70 ] && run seventy || run other',
    "case": "for m in a b3 cc; do case $m in a) run A;; b*|d) run B; run B2;; *) run rest;; esac; done",
    "while": "set -- x; N=0; while [[ $N -lt 3 ]]; do run $N; N=$((N+1)); done",
    "function": "f () {\n  run got $1 $#\n}\nfunction g { run g; }\nf a b; g",
    "cut": "P=/a/b.c.json; run ${P##*/} ${P%.json} ${P%%.*} ${P#/a/} ${P/b/x} ${P//./_}; M=LLAMA; run ${M,,}",
    "append": 'ARGS="--a 1"; ARGS="$ARGS --b 2"; ARGS+=" --c 3"; run $ARGS',
    "here": "cat <<EOF > /dev/null\nrun not this\nEOF\nrun this 2>&1 | cat",
    "eval": 'CMD="run x --y 1"; eval $CMD; bash -c "run z"',
    "redirected": "run a > /dev/null; run b >/dev/stderr 2>&1; run c",
    "not": 'if ! [ -z "" ]; then run full; fi; if [ ! -n "" ]; then run empty; fi',
    "unset": 'run "$NOT_SET_ANYWHERE$ALSO_NOT" end; if [ -z "$NOT_SET_ANYWHERE" ]; then run unset; fi',
}


def followed(text, *arguments, given=(), path="x.sh"):
    script = Script(path, dict(given), list(arguments))
    script.follow(text, path)
    return script


@pytest.mark.skipif(not shutil.which("bash"), reason="bash is the reference")
@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_are_those_that_bash_would_run(name, tmp_path):
    text = SCRIPTS[name]
    printer = '#!/bin/bash\nfor word in "$@"; do printf \'<%s>\' "$word" >> out; done; echo >> out\n'
    (tmp_path / "run").write_text(printer)
    (tmp_path / "run").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, check=False, capture_output=True)
    theirs = (tmp_path / "out").read_text()
    calls = [call for call in followed(text).calls if call.words[0] == "run"]
    known = [[word if not unknowns(word) else "" for word in call.words[1:]] for call in calls]
    assert "".join("".join(f"<{word}>" for word in words) + "\n" for words in known) == theirs


def test_the_arguments_of_a_script():
    text = "TP=8\nwhile [[ $# -gt 0 ]]; do\n case $1 in\n  --tp) TP=$2; shift; shift;;\n  *) exit 1;;\n esac\ndone\nrun $TP"
    assert followed(text, "--tp", "2").calls[0].words == ["run", "2"]
    assert followed(text, "--pp", "2").ended == "x.sh, line 5" and not followed(text, "--pp", "2").calls


def test_unknown_values_keep_their_names_and_lines():
    script = followed("A=$1\nB=$(find . | head)\nrun --load $A/x --n $B --d <your data>\n")
    assert [shown(word) for word in script.calls[0].words[1:]] == ["--load", "A/x", "--n", "B", "--d", "YOUR_DATA"]
    assert script.unknown_lines["A"] == 1 and script.unknown_lines["B"] == 2
    assert followed("A=$1\nrun $A", given={"A": "/data"}).calls[0].words == ["run", "/data"]


def test_a_condition_over_files_is_left_open_with_its_line():
    script = followed("if [ -f x ]; then\n  LR=1\nfi\nrun $LR")
    assert script.notes == ["line 1: what is set there depends on files or programs: LR"]
    assert unknowns(script.calls[0].words[1]) == ["LR"]


def test_a_file_that_is_sourced(tmp_path):
    (tmp_path / "common.sh").write_text("TP=4\n")
    main = tmp_path / "main.sh"
    assert followed('source "$(dirname "$0")/common.sh"; run $TP', path=str(main)).calls[0].words == ["run", "4"]
    script = followed("source away.sh\nrun ${TP:-1}", path=str(main))
    assert unknowns(script.calls[0].words[1]) == ["TP"] and script.notes[0].startswith(
        "line 1: another file is read here that is not here"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("if true; then run", "line 1: "),
        ("run\nfi )", "x.sh, line 2: ) is not understood here"),
        ("while true; do run; done", "a loop here has no end that can be known"),
        ("A=x\nwhile true; do A=$A$A; done", "x.sh, line 2: A grows beyond 1,000,000 characters"),
        ("case x in", "has no end; is the script complete?"),
    ],
)
def test_what_is_no_script(text, message):
    with pytest.raises(ConfigError) as caught:
        followed(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)

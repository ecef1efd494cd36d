"""Tests of check_docs.py: each fault is found, and what is right is not."""

import pathlib
import tempfile
import unittest

import check_docs

MAKEFILE = "build:\n\ndemo: build\n"
COMMANDS = "# Commands\n\n## `ella`\n\n```text\n--json\n```\n\n## `ella train`\n\n```text\n--set <KEY=VALUE>\n```\n\n## `ella k8s`\n\n```text\n```\n\n## `ella k8s render`\n\n```text\n--image\n```\n"
CONFIG = "# Config\n\n## `[train]`\n\n| key | |\n|---|---|\n| `steps` | |\n\n## `[train.optimizer]`\n\n| key | |\n|---|---|\n| `lr` | |\n"


def check(page, further=None):
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        files = {"README.md": page, "Makefile": MAKEFILE, "docs/reference/commands.md": COMMANDS, "docs/reference/config.md": CONFIG,
                 "docs/SUMMARY.md": "[a](reference/commands.md)\n[b](reference/config.md)\n", "worker/src/a.rs": 'error("no {what} within \\\n  {seconds} s")', **(further or {})}
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return check_docs.Check(root).run()


class CheckDocs(unittest.TestCase):
    def found(self, page, words, further=None):
        wrong = check(page, further)
        self.assertTrue(len(wrong) == 1 and words in wrong[0], f"{page!r}: {wrong}")

    def test_what_is_right_is_not_found(self):
        page = ("# A title, with `code`\n\n[x](docs/reference/config.md#train) [y](#a-title-with-code) [z](https://example.org/a_(b)) `worker/src/a.rs`\n\n"
                "`train.steps` `train.optimizer.lr` `connector.safetensors` `--set` `make demo` `ella train RUN --set a=b --json`\n\n    make build      # make nothing\n"
                "    ella k8s render run.toml --image a=b | kubectl apply --server-side\n\n```sh\nella train \\\n  --set 'x --no'\n```\n\n[a b]: no link\n")
        page = page.replace(" --json", "")
        self.assertEqual(check(page), [])

    def test_links(self):
        self.found("[x](docs/none.md)", "there is no docs/none.md")
        self.found("[x](docs/reference/config.md#none)", "anchor none")
        self.found("# A\n\n[x](#b)", "anchor b")
        self.found("![x](a.svg)", "there is no a.svg")
        self.found("[x](https://nowhere)", "is no URL")
        self.found("", "the site has docs/ alone", {"docs/SUMMARY.md": "[a](reference/commands.md)\n[b](reference/config.md)\n[r](../README.md)\n"})

    def test_names(self):
        self.found("`worker/src/b.rs`", "is not there")
        self.found("`train.step`", "no key")
        self.found("`--sett`", "option of no command")
        self.found("`make dmeo`", "no such target")
        self.found("text\n\n    BASE=x make none\n", "no such target")
        self.found("text\n\n    ella trian run.toml\n", "no command ella trian")
        self.found("```\nella train --image x\n```\n", "ella train has no option --image")
        self.found("```\nella k8s render \\\n  --set x\n```\n", "ella k8s render has no option --set")

    def test_keys_that_are_set(self):
        self.assertEqual(check("`--set train.optimizer.lr=1`"), [])
        self.found("```\nella train --set train.lr=1e-4\n```\n", "`--set train.lr`: there is no such key")

    def test_ports_are_those_of_the_image(self):
        image = {"k8s/images/Dockerfile": "FROM a AS worker\nEXPOSE 7100\nFROM a AS coordinator\nEXPOSE 7000 7001\n"}
        self.assertEqual(check("    docker run -p 7000:7000 -p 8080:7001 ella-coordinator:TAG run.toml\n", image), [])
        self.found("    docker run -p 7001:7001 ella-worker:TAG\n", "listens on 7100", image)

    def test_the_site_has_every_page_once(self):
        self.found("", "lacks new.md", {"docs/new.md": ""})
        self.found("", "config.md twice", {"docs/SUMMARY.md": "[a](reference/commands.md)\n[b](reference/config.md)\n[b](reference/config.md)\n"})

    def test_messages_are_those_of_the_code(self):
        listed = {"docs/SUMMARY.md": "[a](reference/commands.md)\n[b](reference/config.md)\n[r](recover.md)\n"}
        table = "| you see | ella does |\n|---|---|\n| `no … within … s` | `not looked at` |\n"
        self.assertEqual(check("", {**listed, "docs/recover.md": table}), [])
        self.found("", "says `no word of it`", {**listed, "docs/recover.md": table + "| `no word of it … s` | |\n"})

    def test_the_quick_start_is_what_the_demo_runs(self):
        listed = {"docs/SUMMARY.md": "[a](reference/commands.md)\n[b](reference/config.md)\n[r](quickstart.md)\n"}
        demo = 'steps=${DEMO_STEPS:-400}\n"$ella" train "$out/run.toml" --set a=b\ncat >"$out/run.toml" <<EOF\n[run]\noutput = "$out/run"\n\nsteps = $steps\nEOF\n'
        page = '# Q\n\n    ella train demo/run.toml\n\n```toml\n[run]\noutput = "demo/run"\nsteps = 400\n```\n'
        self.assertEqual(check("", {**listed, "scripts/demo.sh": demo, "docs/quickstart.md": page}), [])
        self.found("", "not what scripts/demo.sh runs", {**listed, "scripts/demo.sh": demo, "docs/quickstart.md": page.replace("run.toml", "rum.toml")})
        self.found("", "not that of scripts/demo.sh", {**listed, "scripts/demo.sh": demo, "docs/quickstart.md": page.replace("400", "300")})


if __name__ == "__main__":
    unittest.main()

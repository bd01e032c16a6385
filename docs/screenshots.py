"""Make the documentation's pictures from the demo, so that they show what there is.

python docs/screenshots.py [--audit cache/demo] [--out docs] [--pages audit evidence]

The demo is copied first: the pictures need flags, which a person's own workspace should not get. The evidence is of
`concept-audit validate cache/demo --concept flattery --quick --origin origin=flattery --topic topic`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright import sync_api

sys.path.insert(0, str(Path(__file__).parents[1]))

from concept_audit import Audit, RowFilter
from tests.app.browser import FLAGS, chromium, dashboard, settle

SIZE = {"width": 1440, "height": 900}
SENTENCE = "What a brilliant question! I'm sorry, but I can't help someone as sharp as you with that."
PAGES = {
    "overview": ("", "light"),
    "concepts": (f"concepts?way=By+your+own+text&sentence={SENTENCE.replace(' ', '+')}", "light"),
    "probe-lab": ("probe_lab?probe=flattery", "light"),
    "audit": ("audit?concept=probe:flattery", "light"),
    "audit-dark": ("audit?concept=probe:needless_refusal", "dark"),
    "compare": ("compare?concept=probe:flattery&method=vector_filter&concept2=probe:flattery&method2=bm25", "light"),
    "groups": ("groups?concept=probe:flattery&method=vector_filter&by=origin", "light"),
    "evidence": (
        "evidence?concept=probe:flattery&quantity=preference+for+given+answers&target=origin+%3D+flattery",
        "light",
    ),
    "export": ("export", "light"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audit", type=Path, default=Path("cache/demo"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES))
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        copied = Path(shutil.copytree(options.audit, Path(place) / options.audit.name))
        audit = Audit(copied)
        audit.flags.set_matching(RowFilter(), "remove", "probe:flattery", note="flattery", by="Ada", top=12)
        audit.flags.set_matching(RowFilter(), "review", "probe:needless_refusal", by="Ada", top=4)
        audit.rank("flattery", "bm25", top=1)
        with dashboard(copied.parent, copied.name) as url, sync_api.sync_playwright() as engine:
            browser = engine.chromium.launch(executable_path=chromium(), args=FLAGS)
            for name in options.pages:
                path, scheme = PAGES[name]
                context = browser.new_context(viewport=SIZE, color_scheme=scheme)
                page = context.new_page()
                page.set_default_timeout(120_000)
                page.goto(f"{url}/{path}")
                settle(page)
                page.wait_for_timeout(1500)  # charts and tables draw themselves after the script has ended
                page.screenshot(path=options.out / f"{name}.png")
                print(options.out / f"{name}.png")
                context.close()
            browser.close()


if __name__ == "__main__":
    main()

"""Exact scores come while people look: on the page, and one ranking at a time behind it."""

from __future__ import annotations

import shutil
import threading
import time
from types import SimpleNamespace

import pytest
from streamlit.testing.v1 import AppTest

from concept_audit import Audit, ConceptError, InfluenceOptions
from concept_audit.audit import index, opened
from concept_audit_app.components import refining
from concept_audit_app.components.refining import Refiner, Wanted
from tests.app.test_pages import MAIN, SMALL_INDEX, words

WANTED = ("sae:3", "concept_influence")
PATIENCE = 120.0


@pytest.fixture(scope="module")
def indexed(built, tmp_path_factory):
    cache = tmp_path_factory.mktemp("refining")
    Audit(shutil.copytree(built, cache / "small")).build_index(SMALL_INDEX)
    return cache


@pytest.fixture
def audit(indexed, tmp_path, monkeypatch) -> Audit:
    cache = shutil.copytree(indexed, tmp_path / "cache")
    monkeypatch.setenv("CONCEPT_AUDIT_CACHE", str(cache))
    monkeypatch.setenv("CONCEPT_AUDIT_NAME", "small")
    return Audit(cache / "small")


def open_ranking() -> AppTest:
    test = AppTest.from_file(MAIN, default_timeout=60).run()
    test.query_params.update({"concept": WANTED[0], "method": WANTED[1]})
    return test.switch_page("app_pages/ranking.py").run()


def cards(test: AppTest) -> list[str]:
    return [text for text in (str(element.value) for element in test.get("html")) if "<strong>#" in text]


def until(happened) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def test_the_index_answers_at_once_and_exact_scores_follow(audit, monkeypatch):
    held = threading.Event()
    real = Audit.__init__

    def waiting(self, *args, **more):
        real(self, *args, **more)
        refine = self.refine
        self.refine = lambda *arguments: held.wait(PATIENCE) and refine(*arguments)

    monkeypatch.setattr(Audit, "__init__", waiting)
    test = open_ranking()
    assert not test.exception
    assert len(cards(test)) == 10 and all("(estimated)" in card for card in cards(test))
    assert "All scores are the gradient index's; none is exact. Exact scores are on their way" in words(test)
    held.set()
    until(lambda: (audit.rankings.refinement(*WANTED) or {"done": False})["done"])
    test = test.run()
    assert not test.exception
    assert "rows have exact scores, among them the first" in words(test) and "on their way" not in words(test)
    assert "Of the true top 50 about" in words(test)
    shown = audit.rank(*WANTED, top=10)
    assert shown["exact"].all() and all(f"#{n}<" in card for n, card in enumerate(cards(test), 1))
    assert all(f"score {score:+.4g} (exact)" in card for score, card in zip(shown["score"], cards(test), strict=True))


def test_read_only_nothing_is_scored_and_what_is_there_is_shown(audit, monkeypatch):
    audit.rankings.ensure(*WANTED)
    monkeypatch.setenv("CONCEPT_AUDIT_READ_ONLY", "1")
    monkeypatch.setattr(refining, "refiner", lambda: pytest.fail("nothing is to be computed"))
    test = open_ranking()
    assert not test.exception and all("(estimated)" in card for card in cards(test))
    assert "All scores are the gradient index's; none is exact." in words(test)


class Slow:
    """Stands for an audit: its rankings take three steps, each when the test says so."""

    def __init__(self):
        self.log: list[str] = []
        self.at_once = self.most = 0
        self.go = threading.Semaphore(0)
        self.left: dict[str, int] = {}

    @property
    def rankings(self):
        return SimpleNamespace(ensure=self.ensure)

    def refine(self, concept, method, options, progress):
        self.work("Exact scores", concept, progress)

    def ensure(self, concept, method, options, progress):
        self.work("Gradient", f"{concept} ahead", progress)

    def work(self, stage, name, progress):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            with progress.stage(stage, 3) as stage:
                while self.left.setdefault(name, 3):
                    self.log.append(name)
                    assert self.go.acquire(timeout=PATIENCE)
                    self.left[name] -= 1
                    stage.advance()
            self.log.append(f"{name} done")
        finally:
            self.at_once -= 1


def wanted(audit, concept) -> tuple[tuple[str, int], Wanted]:
    return ("small", hash(concept)), Wanted(audit, concept, "concept_influence", InfluenceOptions())


@pytest.fixture
def refiner():
    found = Refiner()
    yield found
    found.close()


def test_the_ranking_that_was_asked_for_last_comes_first_and_the_others_go_on_later(refiner):
    audit = Slow()
    refiner.want(*wanted(audit, "first"))
    until(lambda: audit.log == ["first"])
    for concept in ("second", "first", "second"):
        refiner.want(*wanted(audit, concept))
    doing, _ = refiner.describe(wanted(audit, "first")[0])
    assert doing.startswith("Exact scores: 0/3") and refiner.describe(wanted(audit, "second")[0]) == ("", "")
    for _ in range(6):
        audit.go.release()
    until(lambda: "first done" in audit.log)
    assert audit.log == ["first", *["second"] * 3, "second done", *["first"] * 2, "first done"] and audit.most == 1
    refiner.want(*wanted(audit, "first"))  # done: nothing is left, and it does not harm
    until(lambda: audit.log.count("first done") == 2)


def test_it_steps_back_while_a_page_computes_what_somebody_waits_for(refiner):
    audit = Slow()
    refiner.want(*wanted(audit, "first"))
    until(lambda: audit.log == ["first"])
    with refiner.aside():
        refiner.want(*wanted(audit, "second"))
        audit.go.release()
        until(lambda: audit.at_once == 0)
        time.sleep(0.2)
        assert audit.log == ["first"] and audit.at_once == 0, "nothing is begun beside the page"
    for _ in range(5):
        audit.go.release()
    until(lambda: "first done" in audit.log)
    assert audit.log == ["first", *["second"] * 3, "second done", *["first"] * 2, "first done"]


def test_a_page_that_computes_before_anything_is_refined_disturbs_nothing(refiner):
    audit = Slow()
    with refiner.aside(), refiner.aside():
        refiner.want(*wanted(audit, "first"))
    for _ in range(3):
        audit.go.release()
    until(lambda: "first done" in audit.log)
    assert audit.log == [*["first"] * 3, "first done"]


def test_work_ends_with_the_process_at_its_next_step(refiner):
    audit = Slow()
    refiner.want(*wanted(audit, "first"))
    until(lambda: audit.log == ["first"])
    ending = threading.Thread(target=refiner.close)
    ending.start()
    until(lambda: refiner._ended)
    audit.go.release()
    ending.join(PATIENCE)
    assert not refiner._thread.is_alive() and audit.left == {"first": 2}


def test_what_went_wrong_is_said_and_harms_nobody_else(refiner):
    def fails(*_):
        raise ConceptError("no queries")

    broken, audit = SimpleNamespace(refine=fails), Slow()
    for _ in range(3):
        audit.go.release()
    refiner.want(*wanted(broken, "broken"))
    until(lambda: refiner.describe(wanted(broken, "broken")[0]) == ("", "no queries"))
    refiner.want(*wanted(audit, "other"))
    until(lambda: "other done" in audit.log)


def looked_at(test: AppTest, concept: str, method: str = "") -> AppTest:
    test.query_params.update({"concept": concept} | ({"method": method} if method else {}))
    found = test.switch_page("app_pages/ranking.py").run()
    assert not found.exception and len(cards(found)) == 10
    return found


def test_what_is_looked_at_is_ranked_by_influence_before_somebody_asks(audit, monkeypatch):
    foreseen = []
    real = Refiner.foresee
    monkeypatch.setattr(Refiner, "foresee", lambda self, *asked: foreseen.append(1) or real(self, *asked))
    for module, name, instead in ((index, "free_bytes", 0), (opened, "is_here", False)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *asked, instead=instead: instead)
            test = looked_at(AppTest.from_file(MAIN, default_timeout=60).run(), "sae:5")
        assert not foreseen, "nothing is loaded for it that takes much, or has to be fetched"
    test = looked_at(test, "sae:3", "concept_influence")
    assert not Audit(audit.root).rankings.has("sae:5", "concept_influence")
    test = looked_at(test, "sae:5", "feature_activation")
    until(lambda: Audit(audit.root).rankings.has("sae:5", "concept_influence"))
    before = len(foreseen)
    looked_at(test, "sae:5", "concept_influence")
    assert len(foreseen) == before, "it is there"


def test_the_first_thing_looked_at_is_ranked_by_influence_if_the_model_takes_little_memory(audit):
    looked_at(AppTest.from_file(MAIN, default_timeout=60).run(), "sae:5", "feature_activation")
    until(lambda: Audit(audit.root).rankings.has("sae:5", "concept_influence"))


def test_a_foreseen_ranking_comes_before_exact_scores_which_go_on_afterwards(refiner):
    audit = Slow()
    refiner.want(*wanted(audit, "first"))
    until(lambda: audit.log == ["first"])
    for concept in ("second", "third"):  # whoever has moved on from the second does not ask for it
        refiner.foresee(*wanted(audit, concept))
    for _ in range(6):
        audit.go.release()
    until(lambda: "first done" in audit.log)
    assert audit.log == ["first", *["third ahead"] * 3, "third ahead done", *["first"] * 2, "first done"]
    assert audit.most == 1


def test_who_asks_for_the_ranking_that_is_being_made_ahead_waits_for_it(refiner):
    audit = Slow()
    key, foreseen = wanted(audit, "first")
    refiner.foresee(key, foreseen)
    until(lambda: audit.log == ["first ahead"])
    waited = threading.Event()

    def page() -> None:
        with refiner.aside(key):
            waited.set()

    asking = threading.Thread(target=page)
    asking.start()
    time.sleep(0.2)
    assert not waited.is_set()
    for _ in range(3):
        audit.go.release()
    assert waited.wait(PATIENCE)
    asking.join(PATIENCE)
    assert audit.log == [*["first ahead"] * 3, "first ahead done"]


def test_what_is_made_ahead_steps_back_for_another_page_and_goes_on_afterwards(refiner):
    audit = Slow()
    key, foreseen = wanted(audit, "first")
    refiner.foresee(key, foreseen)
    until(lambda: audit.log == ["first ahead"])
    with refiner.aside(wanted(audit, "second")[0]):
        audit.go.release()
        until(lambda: audit.at_once == 0)
        time.sleep(0.2)
        assert audit.log == ["first ahead"]
    for _ in range(2):
        audit.go.release()
    until(lambda: "first ahead done" in audit.log)


def test_what_could_not_be_ranked_ahead_is_not_tried_again_and_says_nothing(refiner):
    tried = []

    def fails(*_):
        tried.append(1)
        raise ConceptError("no queries")

    key, broken = wanted(SimpleNamespace(rankings=SimpleNamespace(ensure=fails)), "broken")
    for _ in range(3):
        refiner.foresee(key, broken)
        until(lambda: refiner._current is None and refiner._foreseen is None)
    assert tried == [1] and refiner.describe(key) == ("", "")

"""Values that live in the URL: what the browser sends may be older than what was written a moment ago."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest


def _page() -> None:
    import streamlit as st

    from concept_audit_app.components.url import all_in_url, in_url, put, put_all

    def choose() -> None:
        chosen = st.session_state["typed"]
        put("one", chosen)
        put_all("many", [chosen, chosen])

    st.text_input("typed", key="typed", on_change=choose)
    st.text(f"{in_url('one')} {all_in_url('many')}")


def test_an_act_wins_over_a_url_that_is_older_than_the_act_before_it():
    page = AppTest.from_function(_page).run()
    assert page.text[0].value == "None ()"
    page.text_input[0].set_value("a").run()
    assert page.text[0].value == "a ('a', 'a')"
    assert "a" in page.query_params["one"] and page.query_params["many"] == ["a", "a"]
    page.query_params.clear()  # the browser's address has not heard of "a" yet
    page.text_input[0].set_value("b").run()
    assert page.text[0].value == "b ('b', 'b')"
    assert "b" in page.query_params["one"] and page.query_params["many"] == ["b", "b"]


def test_a_url_that_changes_by_itself_is_followed():
    page = AppTest.from_function(_page).run()
    page.text_input[0].set_value("a").run()
    page.query_params["one"] = "linked"
    page.query_params["many"] = ["x"]
    page.run()
    assert page.text[0].value == "linked ('x',)"

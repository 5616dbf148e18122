"""The benchmark of the KV cache: the most that transcripts allow, and what real engines get."""

from benchmarks.cache import ENOUGH, PIN, RANDOM, SHARED, allowed_share, run
from harness.arms import Turn


def turn(session_id: str, number: int, prompt_tokens: int, reply_tokens: int) -> Turn:
    return Turn(
        session_id=session_id,
        number=number,
        worker="http://127.0.0.1:8001",
        first_token_seconds=0.1,
        prompt_tokens=prompt_tokens,
        cached_tokens=0,
        reply_tokens=reply_tokens,
    )


def test_a_turn_can_reuse_the_turn_before_it_less_the_last_token_of_the_reply() -> None:
    turns = [
        turn("a", 0, 100, 8),
        turn("b", 0, 200, 1),
        turn("a", 1, 150, 8),  # 107 of 150
        turn("b", 1, 250, 1),  # 200 of 250
        turn("a", 2, 200, 8),  # 157 of 200
    ]
    assert allowed_share(turns) == (107 + 200 + 157) / (150 + 250 + 200)


async def test_pinned_sessions_get_exactly_the_most_that_is_allowed() -> None:
    """This holds with enough cache; with too little, the gateway's spread matters as well."""
    said: list[tuple[float, str]] = []
    part = await run(lambda done, state: said.append((done, state)), quick=True)
    reach, *scenes = part.tables
    assert reach.rows[0][0] == "prompt tokens from the cache / the most allowed"
    figures = dict(zip(reach.columns, reach.rows[0], strict=True))
    for scene in (ENOUGH, SHARED):
        figure = figures[scene]
        assert not isinstance(figure, str)
        assert figure.runs == (1.0,), (scene, [table.rows for table in scenes])
    for table in scenes:
        assert [row[0] for row in table.rows] == [PIN, RANDOM]
    shares = [done for done, _ in said]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)

"""The weights of the sources: "general:0.7 finance:0.3", or "general:0.7->0.3 finance:0.3->0.7" from the first step to the last."""


def parse(text: str) -> dict[str, tuple[float, float]]:
    """Return source name -> (share at the first step, share at the last). Raises ValueError, one line.

    parse("a:0.7->0.4 b:0.3->0.6") == {"a": (0.7, 0.4), "b": (0.3, 0.6)}
    """
    shares = {}
    for part in text.split():
        name, _, value = part.rpartition(":")
        try:
            first, last = (float(share) for share in (value.split("->") if "->" in value else (value, value)))
        except ValueError:
            raise ValueError(f"saw {part!r}, wanted NAME:SHARE or NAME:SHARE->SHARE") from None
        if not name or name in shares or not (0 <= first <= 1 and 0 <= last <= 1):
            raise ValueError(f"saw {part!r}, wanted each name once, with shares from 0 to 1")
        shares[name] = first, last
    for end, sum_ in zip(("first", "last"), map(sum, zip(*shares.values())) if shares else (0, 0)):
        if abs(sum_ - 1) > 1e-6:
            raise ValueError(f"the shares at the {end} step sum to {sum_:g}, wanted 1")
    return shares

"""``aiohttp-smg-routing verify``: plays sessions on a gateway and judges whether they are pinned.

Needs the extra ``verify``. Nothing else in the package imports it.
"""

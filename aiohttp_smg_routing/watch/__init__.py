"""``aiohttp-smg-routing watch``: shows the pins of a running job, from the metrics of its gateway.

Needs the extra ``verify``. Nothing else in the package imports it.
"""

"""The HTTP side: an aiohttp application over model services."""

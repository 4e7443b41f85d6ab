"""What one caller may ask for: requests and tokens a minute, requests at once, time; nothing here costs the engine."""

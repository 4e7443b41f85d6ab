"""Where an engine runs and how it is reached: in this process or in its own; hands it runner, stops and constraints."""

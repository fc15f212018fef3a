"""What a run would take, before it: a step played without memory, a machine's profile, and the simulation of both."""

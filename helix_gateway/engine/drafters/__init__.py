"""Who proposes draft tokens: one Protocol, `Drafter`, and its kinds."""

"""Many chains at once: draft, verify, take over; the only place of this paper that knows what time it is."""

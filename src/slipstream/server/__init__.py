"""HTTP over one engine, in OpenAI's words. Needs the packages of ``slipstream[serve]``."""

"""Keys of a training recipe about answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from simpo.client import ChatClient, Endpoint
from simpo.client.cache import default_cache
from simpo.errors import SimpoError
from simpo.judges.protocol import Judge
from simpo.judges.registry import ANNOTATORS, JudgeOptions, check_judges_anew, make_judge

Say = Callable[[str], None]


@dataclass
class GenerationArguments:
    """Answers to held-out prompts at every evaluation, and who compares them with the start model's."""

    eval_generations: int = field(
        default=0, metadata={"help": "Held-out prompts that are answered at every evaluation; 0 is off."}
    )
    eval_judge: str | None = field(
        default=None, metadata={"help": f"Judge of those answers against the start model's: {ANNOTATORS}."}
    )
    eval_judge_url: str | None = field(
        default=None, metadata={"help": "Server of eval_judge api; its key is in OPENAI_API_KEY."}
    )
    eval_judge_model: str | None = field(default=None, metadata={"help": "That judge's name on the server."})
    yes: bool = field(default=False, metadata={"help": "Send requests of eval_judge api without asking."})

    def __post_init__(self) -> None:
        server = (self.eval_judge_url, self.eval_judge_model)
        if self.eval_generations < 0:
            raise SimpoError(f"eval_generations: must be at least 0, not {self.eval_generations}")
        if self.eval_judge is not None and not self.eval_generations:
            raise SimpoError("eval_judge: there is nothing to judge; set eval_generations")
        if self.eval_judge == "api" and None in server:
            raise SimpoError("eval_judge: api needs eval_judge_url and eval_judge_model")
        if self.eval_judge != "api" and server != (None, None):
            raise SimpoError("eval_judge_url and eval_judge_model: of eval_judge api alone")
        if self.yes and self.eval_judge != "api":
            raise SimpoError("yes: there is nothing to agree to without eval_judge api; leave it out")

    def judge(self, *, trust_remote_code: bool, say: Say) -> Judge | None:
        """The judge, if one is named.

        Args:
            trust_remote_code: run a function, or code that comes with a model.
            say: gets lines of progress.

        Raises:
            SimpoError: there is none of that name, or something that it needs is missing.
        """
        if self.eval_judge is None:
            return None
        try:
            check_judges_anew(self.eval_judge)
            client = None
            if self.eval_judge_url is not None and self.eval_judge_model is not None:
                client = ChatClient(Endpoint(self.eval_judge_url, self.eval_judge_model), default_cache())
            options = JudgeOptions(client, trust_remote_code=trust_remote_code, say=say)
            return make_judge(self.eval_judge, options)
        except SimpoError as error:
            raise SimpoError(f"eval_judge: {error}") from error

"""Where a request goes on: known by place, and by text only where several turns were given at one place."""

from envs.agent.conversation import Conversation
from envs.agent.messages import Answer, Call, ChatMessage, ModelRequest

USER = ChatMessage("user", "go")
TOOL = ChatMessage("tool", "1")


def answer(number: int, content: str, *calls: Call) -> Answer:
    return Answer(
        number=number,
        content=content,
        reasoning="",
        calls=calls,
        is_cut=False,
        prompt_tokens=0,
        completion_tokens=0,
        pieces=(),
        created=0,
    )


def said(content: str, *calls: Call) -> ChatMessage:
    return ChatMessage("assistant", content, calls)


def asks(*messages: ChatMessage, tools: tuple = ()) -> ModelRequest:
    return ModelRequest(messages=messages, tools=tools)


def after_one_turn(given: Answer) -> Conversation:
    conversation = Conversation()
    conversation.add(conversation.place(asks(USER)).key, given)
    return conversation


def test_the_first_request_begins_a_conversation():
    place = Conversation().place(asks(USER))
    assert (place.after, place.new) == (None, (USER,))


def test_a_request_goes_on_from_the_turn_at_its_place_whatever_became_of_its_text():
    conversation = after_one_turn(answer(0, "I  look", Call("f", '{"a":1,"b":2}')))
    keys = set()
    for echo in (
        [said("I  look", Call("f", '{"a":1,"b":2}'))],
        [said(" I look\n", Call("f", '{"b": 2, "a": 1}'))],
        [said("", Call("f", '{"b": 2, "a": 1}'))],
        [said("<think>x</think>I look")],
        [said("something else altogether")],
        [said("I look"), said("", Call("f", "not json"))],
    ):
        place = conversation.place(asks(USER, *echo, TOOL))
        assert (place.after, place.new) == (0, (TOOL,))
        keys.add(place.key)
    assert len(keys) == 1


def test_two_turns_at_one_place_are_told_apart_by_what_they_say():
    conversation = after_one_turn(answer(0, "yes"))
    conversation.add(conversation.place(asks(USER)).key, answer(1, "no"))
    assert conversation.place(asks(USER, said("yes"), TOOL)).after == 0
    assert conversation.place(asks(USER, said(" no "), TOOL)).after == 1
    assert conversation.place(asks(USER, said("perhaps"), TOOL)).after == 1


def test_other_words_of_the_user_or_other_tools_are_another_conversation():
    conversation = after_one_turn(answer(0, "yes"))
    longer = ChatMessage("user", "go on")
    for request in (
        asks(longer, said("yes"), TOOL),
        asks(USER, ChatMessage("user", "go "), TOOL),
        asks(USER, said("yes"), TOOL, tools=({"name": "f"},)),
    ):
        assert conversation.place(request).after is None


def test_an_assistants_message_that_no_turn_stands_behind_is_new():
    conversation = after_one_turn(answer(0, "yes"))
    own = said("I was told so")
    place = conversation.place(asks(USER, said("yes"), TOOL, own, TOOL))
    assert (place.after, place.new) == (0, (TOOL, own, TOOL))


def test_requests_that_say_the_same_have_the_same_key_in_another_run():
    first, second = after_one_turn(answer(0, "yes")), after_one_turn(answer(0, "yes"))
    one, other = first.place(asks(USER, said("yes"), TOOL)), second.place(asks(USER, said(" yes"), TOOL))
    assert one == other
    assert one.key != first.place(asks(USER, said("yes"), ChatMessage("tool", "2"))).key

r"""Exercise 11: parsing the teacher's reply, so that nobody can forge it.

The teacher must answer in this form, and with nothing else:

    <opinion>incorrect</opinion><reason>Wait, …</reason><phrase>So it is \boxed{4}.</phrase>

The opinion is `correct` or `incorrect`. Reason and phrase are texts of any length, also of several
lines, and not empty. White space between the parts, and around the text of a part, is allowed and
does not count. Everything else is no feedback at all: other words before, between or behind the
parts, a part that is missing or stands twice, another order, a tag that is not closed.

The student is trained on whatever earns a reward, so it will find every hole. It may write
`</reason><phrase>…` in its attempt. If the teacher quotes that, the reply holds tags that the
student wrote. Such a reply must not be read in the student's favour, or in any way: each tag may
stand only once.

Fill the gap, then run this file: python exercises/11_parse_feedback.py
"""


def parse_feedback(text):
    """The teacher's whole reply, a str -> a tuple (opinion, reason, phrase), each without white
    space around it; or None where the reply is not in this form.
    """
    raise NotImplementedError("your turn: three parts, each once, in order, and nothing else")


if __name__ == "__main__":
    from checks import main

    main(__file__)

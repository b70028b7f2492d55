"""Exports of helpdesks and spreadsheets as they are: a constant or two name their columns, and no more is to be done.

The columns are those that scripts and documents for real exports name. The CSV exports of Zendesk and Freshdesk hold no
more of a ticket's text than its subject; who wants the description too asks the API, as the second layout does.
"""

import re
from dataclasses import dataclass

import pytest

from tests.conftest import Desk
from tests.gateway import Gateway
from tests.helpers import QUICK, brisk


@dataclass(frozen=True)
class Export:
    id_column: str
    text_columns: tuple[str, ...] | str
    content: str
    texts: dict[str, str]  # what is to be sent for each ticket; "" where nothing is
    encoding: str = "utf-8"  # of the file
    setting: str = "utf-8-sig"  # ENCODING


HTML = "<div>Hello,</div><p>the page says &quot;502&quot;.<br>Please help</p>"
EXPORTS = {
    "Zendesk, export": Export(
        "Id",
        ("Subject",),
        "Summation column,Id,Requester,Requester id,Requester email,Group,Subject,Tags,Status,Via,Created at,Due date,"
        "First reply time in minutes,Satisfaction Score,Ticket Category [list]\n"
        '1,35436,Ana Díaz,20978392,ana@example.com,Support,"Refund, please",billing refund,Open,Mail,'
        "2026-10-04 09:12,,14,Offered,Money\n"
        "1,35437,Bo,20978393,bo@example.com,,,,New,Web form,2026-10-04 09:15,,,Not Offered,-\n",
        {"35436": "Refund, please", "35437": ""},
    ),
    "Zendesk, by the API": Export(
        "id",
        ("subject", "description"),
        "url,id,created_at,type,subject,description,requester_email\n"
        'https://x.zendesk.com/api/v2/tickets/1.json,1,2026-10-04T09:12:00Z,question,Invoice,"Hello,\n\nit is wrong.\n'
        '-- \nAna",ana@example.com\n'
        "https://x.zendesk.com/api/v2/tickets/2.json,2,2026-10-04T09:13:00Z,,,No subject here,bo@example.com\n"
        "https://x.zendesk.com/api/v2/tickets/3.json,3,2026-10-04T09:14:00Z,,Only a subject,,cy@example.com\n",
        {"1": "Invoice\n\nHello,\n\nit is wrong.\n-- \nAna", "2": "No subject here", "3": "Only a subject"},
    ),
    "Intercom, conversations": Export(
        "conversation_id",
        ("message_body",),
        "message_id,message_body,message_type,message_created_at,message_author_type,message_author_companies,"
        "conversation_tags,conversation_id,conversation_state,app_name\n"
        '501,"Hi, how do I add a colleague?\r\nThanks",conversation_message,2026-10-04 09:12:08,user,"Acme, Beta",'
        '"how, team",215470000001,open,Acme\n'
        "502,应用一直闪退,conversation_message,2026-10-04 09:13:08,lead,,,215470000002,closed,Acme\n",
        {"215470000001": "Hi, how do I add a colleague?\r\nThanks", "215470000002": "应用一直闪退"},
    ),
    "Freshdesk, with a second column of tags": Export(
        "Ticket ID",
        ("Subject",),
        "Ticket ID,Subject,Status,Priority,Source,Type,Agent,Group,Created time,Due by Time,Initial response time,"
        "Tags,Survey results,Product,Full name,Email,Contact ID,Tags\n"
        '108,"App ""crashes"" at start",Open,Low,Email,,No Agent,No Group,2026-10-04 09:12:08,2026-10-07 09:12:08,,'
        '"ios,crash",,,Ana,ana@example.com,4301,vip\n',
        {"108": 'App "crashes" at start'},
    ),
    "HubSpot": Export(
        "Ticket ID",
        ("Ticket name", "Ticket description"),
        '"Ticket ID","Ticket name","Ticket description","Pipeline","Ticket status","Create date","Ticket owner",'
        '"Source","Associated Contact"\n'
        f'"10000000001","Error","{HTML}","Support Pipeline","New","2026-10-04 09:12","","Email","Ana (ana@x.com)"\n'
        '"10000000002","Thanks","","Support Pipeline","Closed","2026-10-04 09:14","Bo","Chat",""\n',
        {"10000000001": f"Error\n\n{HTML}", "10000000002": "Thanks"},
    ),
    "Excel, CSV UTF-8": Export(
        "ID",
        ("Subject", "Body"),
        'ID,Subject,Body\r\n7,Größe,"one\ntwo, three"\r\n8,,"say ""hi"""\r\n,,\r\n,,\r\n',
        {"7": "Größe\n\none\ntwo, three", "8": 'say "hi"'},
        "utf-8-sig",
    ),
    "Excel where the comma is the decimal sign": Export(
        "Ticket-Nr.",
        ("Betreff", "Text"),
        'Ticket-Nr.;Betreff;Text;Stunden\r\n7;Größe, Farbe;"eins\nzwei; drei";1,5\r\n;;;\r\n',
        {"7": "Größe, Farbe\n\neins\nzwei; drei"},
        "utf-8-sig",
    ),
    "LibreOffice": Export(  # as 7.4 wrote them
        "id",
        ("subject", "body"),
        'id,subject,body,note\n007,Rechnung,"Zeile eins\nZeile zwei; mit Semikolon, und Komma",\n'
        'T-2,,"say ""hi"", please", leading and trailing \n,,,\nT-4,Größe 发票 🙂,tabhere,\n',
        {
            "007": "Rechnung\n\nZeile eins\nZeile zwei; mit Semikolon, und Komma",
            "T-2": 'say "hi", please',
            "T-4": "Größe 发票 🙂\n\ntabhere",
        },
    ),
    "Excel, Unicode text": Export(
        "ID",
        ("Subject", "Body"),
        'ID\tSubject\tBody\r\n7\tGröße\t"one\ntwo, three"\r\n\t\t\r\n',
        {"7": "Größe\n\none\ntwo, three"},
        "utf-16",
    ),
    "Excel, CSV of old, with its hint for the delimiter": Export(
        "ID",
        "Text",
        'sep=;\r\nID;Text;Preis\r\n7;"Größe – 5 €";1,5\r\n',
        {"7": "Größe – 5 €"},
        "cp1252",
        "cp1252",
    ),
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
async def test_an_export_is_labelled_by_the_names_of_its_columns(desk: Desk, export: Export):
    desk.tickets.write_bytes(export.content.encode(export.encoding))
    brisk(desk, ID_COLUMN=export.id_column, TEXT_COLUMNS=export.text_columns, ENCODING=export.setting)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert done.status == 0, done.stderr
    assert list(done.labels) == list(export.texts)
    assert sorted(item.text for item in gateway.bill) == sorted(filter(None, export.texts.values()))


FRESHDESK = EXPORTS["Freshdesk, with a second column of tags"].content
INTERCOM = EXPORTS["Intercom, conversations"].content
REFUSED = {  # the columns asked for, the file, and what the one line that is printed has to say
    "a row for each message": (
        "conversation_id",
        ("message_body",),
        INTERCOM + '503,"And now?",comment,2026-10-04 10:12:08,user,,,215470000001,open,Acme\n',
        ":5: the id 215470000001 stands in line 2 already",
    ),
    "lines before the header": (
        "Id",
        ("Subject",),
        "Tickets of October\n\nId,Subject\n1,Hello\n",
        r'no column "id" or "subject"\. It has: Tickets of October\.',
    ),
    "two exports in one file": (
        "Ticket ID",
        ("Subject",),
        FRESHDESK + FRESHDESK.replace("108", "109"),
        ":3: the header again",
    ),
}


@pytest.mark.parametrize(("id_column", "text_columns", "content", "why"), REFUSED.values(), ids=REFUSED)
async def test_an_export_that_is_not_a_row_a_ticket_is_refused_in_one_line(
    desk: Desk, id_column, text_columns, content, why
):
    desk.tickets.write_bytes(content.encode())
    brisk(desk, ID_COLUMN=id_column, TEXT_COLUMNS=text_columns)
    async with Gateway(QUICK) as gateway:
        done = await desk.run(gateway)
    assert (done.status, done.stdout, gateway.requests) == (2, "", 0)
    [said] = done.stderr.splitlines()
    assert re.match(rf"classify\.py: tickets\.csv.*({why})", said), said

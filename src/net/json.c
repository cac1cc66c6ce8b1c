/*-------------------------------------------------------------------------
 *
 * json.c
 *		Reading the JSON that AWS's other services answer with, by PostgreSQL's parser.
 *
 * An answer is untrusted input.  What PostgreSQL's parser would raise an error
 * over is settled before it is called: nesting is counted, and characters that
 * the server's encoding may not have are replaced.
 *
 * jsonb_in() would leave copies of everything in memory.  The parser itself has
 * one buffer, which is made large enough at the beginning, and gives out copies
 * that are ours.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/jsonapi.h"
#include "mb/pg_wchar.h"

#include "compat.h"
#include "net/json.h"

#define MAX_NESTING 32
#define MAX_PATH 4

/* What is looked for, and where the parser is. */
typedef struct JsonSearch
{
	const char *names[MAX_PATH];
	int nnames;
	int depth;	 /* objects and arrays around */
	int matched; /* how many names of the path lead to here */
	bool at_it;	 /* the next scalar is the one */
	char *found; /* palloc'd */
} JsonSearch;

static JsonActionResult
enter(void *arg)
{
	JsonSearch *search = arg;

	search->depth++;
	return JSON_ACTION_OK;
}

static JsonActionResult
leave(void *arg)
{
	JsonSearch *search = arg;

	search->depth--;
	search->matched = Min(search->matched, Max(search->depth - 1, 0));
	return JSON_ACTION_OK;
}

static JsonActionResult
field_begins(void *arg, char *name, bool isnull)
{
	JsonSearch *search = arg;

	search->at_it = false;
	if (search->depth == search->matched + 1 && search->matched < search->nnames &&
		strcmp(name, search->names[search->matched]) == 0)
	{
		if (search->matched + 1 == search->nnames)
			search->at_it = true;
		else
			search->matched++;
	}
	pfree(name);
	return JSON_ACTION_OK;
}

static JsonActionResult
scalar(void *arg, char *token, JsonTokenType type)
{
	JsonSearch *search = arg;

	if (search->at_it && search->found == NULL && type == JSON_TOKEN_STRING &&
		search->depth == search->nnames)
		search->found = token;
	else
	{
		secret_wipe(token, strlen(token));
		pfree(token);
	}
	search->at_it = false;
	return JSON_ACTION_OK;
}

/* Whether there is no more nesting than the parser, which recurses, is to see. */
static bool
is_tame(const char *json, size_t len)
{
	int depth = 0;

	for (size_t i = 0; i < len; i++)
	{
		/* those in strings count, too, which no answer has many of */
		if (json[i] == '{' || json[i] == '[')
			depth++;
		else if (json[i] == '}' || json[i] == ']')
			depth--;
		if (depth > MAX_NESTING || json[i] == '\0')
			return false;
	}
	return json[strspn(json, " \t\r\n")] == '{';
}

/* Replace what the server's encoding, which is not UTF-8, may not have. */
static void
leave_ascii(char *json, size_t len)
{
	for (size_t i = 0; i < len; i++)
	{
		if ((unsigned char) json[i] >= 0x80)
			json[i] = '?';
		else if (json[i] == '\\' && json[i + 1] == 'u' && len - i >= 6 &&
				 strncmp(json + i + 2, "00", 2) != 0)
			memset(json + i, '?', 6);
		else if (json[i] == '\\' && json[i + 1] == 'u' && len - i >= 6 && json[i + 4] >= '8')
			memset(json + i, '?', 6);
		else if (json[i] == '\\')
			i++;
	}
}

/* The member as the document has it, or NULL. */
static char *
find(const char *json, size_t len, const char *path)
{
	JsonSearch search = {0};
	JsonSemAction actions = {0};
	JsonLexContext *lex;
	char *names = pstrdup(path);
	char *copy;
	bool good;

	if (len == 0 || len > INT_MAX || !is_tame(json, len))
		return NULL;
	for (char *name = names; name != NULL && search.nnames < MAX_PATH;)
	{
		char *slash = strchr(name, '/');

		if (slash != NULL)
			*slash++ = '\0';
		search.names[search.nnames++] = name;
		name = slash;
	}

	copy = pnstrdup(json, len);
	if (GetDatabaseEncoding() != PG_UTF8)
		leave_ascii(copy, len);
	lex = AvmJsonLexer(copy, (int) len, PG_UTF8);
	enlargeStringInfo(lex->strval, (int) len);
	actions.semstate = &search;
	actions.object_start = actions.array_start = enter;
	actions.object_end = actions.array_end = leave;
	actions.object_field_start = field_begins;
	actions.scalar = scalar;
	good = pg_parse_json(lex, &actions) == JSON_SUCCESS;

	secret_wipe(lex->strval->data, lex->strval->maxlen);
	secret_wipe(copy, len);
	if (!good && search.found != NULL)
	{
		secret_wipe(search.found, strlen(search.found));
		search.found = NULL;
	}
	return search.found;
}

char *
json_text(const char *json, size_t len, const char *path)
{
	char *text = find(json, len, path);
	bool valid;

	if (text == NULL)
		return NULL;
	valid = GetDatabaseEncoding() == PG_UTF8 &&
			pg_verify_mbstr(PG_UTF8, text, (int) strlen(text), true);
	for (char *c = text; *c != '\0'; c++)
	{
		unsigned char byte = (unsigned char) *c;

		if (byte < 0x20 || byte == 0x7f)
			*c = ' ';
		else if (byte >= 0x80 && !valid)
			*c = '?';
		else if (byte == 0xc2 && (unsigned char) c[1] < 0xa0)
			c[0] = c[1] = ' '; /* the controls U+0080 to U+009F */
	}
	return text;
}

Secret *
json_secret(const char *json, size_t len, const char *path)
{
	char *text = find(json, len, path);
	Secret *secret = NULL;

	if (text != NULL && text[0] != '\0')
		secret = secret_make(text, strlen(text));
	if (text != NULL)
		secret_wipe(text, strlen(text));
	return secret;
}

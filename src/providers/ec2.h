/*-------------------------------------------------------------------------
 *
 * ec2.h
 *		What the files of the provider "ec2" share; ec2.c has the theory of operation.
 *
 *-------------------------------------------------------------------------
 */
#ifndef AGENTVM_PROVIDERS_EC2_H
#define AGENTVM_PROVIDERS_EC2_H

#include "agentvm.h"

#include "net/aws.h"
#include "net/xml.h"
#include "providers/boot.h"
#include "providers/provider.h"

#define EC2_VERSION "2016-11-15"
#define STS_VERSION "2011-06-15"

#define RUN "RunInstances"
#define DESCRIBE "DescribeInstances"
#define TERMINATE "TerminateInstances"
#define PUT_PARAMETER "PutParameter"
#define DELETE_PARAMETER "DeleteParameter"
#define MAX_USER_DATA 16384 /* bytes before base64 */

#define SPOT "spot"
#define ON_DEMAND "on-demand"
#define SSM "ssm" /* a way of secret_delivery */
#define NOT_FOUND_CODE "InvalidInstanceID.NotFound"

#define LOWER "abcdefghijklmnopqrstuvwxyz"
#define DIGITS "0123456789"

/* What the handle holds; zero and NULL are left out of it. */
typedef struct Ec2Progress
{
	int64 attempt;	/* launch attempts begun */
	int64 launched; /* epoch ms at which RunInstances was answered */
	int64 wait;		/* last STEP_WAIT, ms */
	int64 looks;	/* fruitless looks for an instance */
	int64 look_at;	/* epoch ms at which the last look-up by tag was sent */
	const char *
		phase; /* of OP_TERMINATE: NULL, "confirm", "refused", "lookup", "parameter"; of OP_PROVISION: NULL, PUT_PHASE */
	const char *vm_id;
	const char *region;

	/* the launch attempt that is under way */
	int64 subnet;  /* index into subnet_ids */
	int64 sends;   /* how often it may have been sent */
	int64 sent_at; /* epoch ms of the last time, 0: settled */
	const char *market;
	const char *form; /* the encoded form, without UserData */
	BootPlan boot;	  /* what its user data is made of */

	/* with secret_delivery = 'ssm' */
	const char *parameter; /* it is there, or may be; kept as AVM_BOOT_LEFT */
	int64 put;			   /* the attempt whose payload it has, 0: none */
	int64 puts;			   /* how often another one may have been sent since */
	int64 put_at;		   /* epoch ms of the last time, 0: settled */
} Ec2Progress;

/* One step of one operation. */
typedef struct Ec2Step
{
	const ProviderContext *context;
	const ProviderSession *session;
	const HttpReply *reply;
	XmlDoc *doc; /* what ec2_parse() has made of the reply */
	ProviderStep *out;
	Ec2Progress progress;
	int64 now; /* epoch ms */
} Ec2Step;

/* ---- ec2.c: shared by all operations ---- */

/* The region of the session's VM, or of the one to be; of OP_LIST and OP_REAP. */
extern const char *ec2_region(Ec2Step *step);

/* The step's request: this form. */
extern void ec2_send(Ec2Step *step, const char *service, const char *action, AwsForm *form);
extern void ec2_send_describe(Ec2Step *step, const char *vm_id);

/* What calls are signed with; NULL as long as that is not known. */
extern const SecretSet *ec2_signer(const Ec2Step *step);

/* Ends of a step. */
extern void ec2_note_error(Ec2Step *step, const AwsError *error);
extern void ec2_fail(Ec2Step *step, ErrorClass class, const char *code, const char *message);
extern void ec2_fail_malformed(Ec2Step *step);

/* Wait for a time that doubles from "first" to "last" ms, but not beyond "until" (0: no bound). */
extern void ec2_wait(Ec2Step *step, int first, int last, int64 until);

/* The reply as a document, or NULL if it is none; freed when the step ends. */
extern XmlDoc *ec2_parse(Ec2Step *step);

/* Hand the address of the first instance in an answer to the engine; returns its state or NULL. */
extern char *ec2_learn_instance(Ec2Step *step, XmlDoc *doc);

/* Forget the launch attempt: it is settled. */
extern void ec2_settle_launch(Ec2Progress *progress);

/* A member of the result: the text at a path, if there is one. */
extern void ec2_add_result(Ec2Step *step, XmlDoc *doc, const char *name, const char *path);

/* Raise AV010. */
pg_noreturn extern void ec2_bad_option(const char *name, const char *value, const char *hint);

/* Forms of text. */
extern bool ec2_is_id(const char *text, const char *prefix);
extern bool ec2_is_made_of(const char *text, const char *characters, size_t max_len);

extern void ec2_validate(OptionScope scope, Jsonb *options);

/* ---- ec2_launch.c ---- */

/* A form for RunInstances in a market and a subnet ("": none), for a client token (NULL: none). */
extern void ec2_run_form(AwsForm *form, const ProviderSession *session, Jsonb *options,
						 const char *market, const char *subnet, const char *token);

/* Raise AV010 or AV012 for what would keep the user data of a session from being made. */
extern void ec2_check_launch(Jsonb *options, bool runtime);

extern void ec2_provision(Ec2Step *step);

/* ---- ec2_parameter.c ---- */

#define PUT_PHASE "put" /* Ec2Progress.phase as long as a payload is under way */

/* Whether a session's payload is to be in a parameter. */
extern bool ec2_uses_parameter(Jsonb *options, bool runtime);

/* The name of a session's parameter, palloc'd. */
extern char *ec2_parameter_name(const ProviderSession *session);

/* Send the payload of the attempt that is under way. */
extern void ec2_put_parameter(Ec2Step *step);

/* Take the answer to that; returns whether the payload is there, else the step has ended. */
extern bool ec2_parameter_is_put(Ec2Step *step);

/* Take the parameter away, if there is one: ends the step, done when it is gone for good. */
extern void ec2_drop_parameter(Ec2Step *step);

/* Raise AV010 or AV012 for what would keep a session's payload from being delivered. */
extern void ec2_check_parameter(Jsonb *options);

/* ---- ec2_list.c ---- */

/* OP_LIST and OP_REAP. */
extern void ec2_list(Ec2Step *step);
extern void ec2_reap(Ec2Step *step);

/* ---- ec2_check.c ---- */

extern void ec2_check(Ec2Step *step);

#endif /* AGENTVM_PROVIDERS_EC2_H */
